//! Which rows of one tensor are another's: fused projections, exchanged halves, rotary pairs.

use std::ops::Range;

/// How the rows of a module of the hub (diffusers, transformers) lie in the tensor of another layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rows {
    /// All of them, in order.
    Whole,
    /// One of `of` equal blocks.
    Block {
        /// Which block.
        index: usize,
        /// How many blocks.
        of: usize,
    },
    /// Neighbours among `of` equal blocks (q, k, v of a model with one number of heads).
    Blocks {
        /// The first of them.
        index: usize,
        /// How many they are.
        count: usize,
        /// How many blocks there are.
        of: usize,
    },
    /// A block as tall as the tensor is wide (q, k, v of FLUX `linear1`).
    Square {
        /// Which block.
        index: usize,
    },
    /// What follows such blocks.
    Rest {
        /// How many blocks come before.
        after: usize,
    },
    /// Both halves, exchanged (scale and shift of `norm_out`).
    Swapped,
    /// Both halves, exchanged, where there are only two: twice as tall as wide. Otherwise all rows.
    SwappedPair,
    /// The tensor is the transpose of a linear layer's weight: it has its inputs first.
    Transposed,
    /// The tensor is the transpose of a weight of GPT-2's Conv1D: it has its outputs first.
    Conv1D,
    /// One expert of a stack [experts, rows, columns], and one of `of` equal blocks of its rows.
    Expert {
        /// The expert.
        expert: usize,
        /// Which block.
        part: usize,
        /// How many blocks.
        of: usize,
    },
    /// All rows; in each head the two halves are interleaved (rotary pairs of GGUF and torchtune).
    Pairs(Heads),
    /// Blocks of all query, then all key, then all value heads (Phi-3, LitGPT).
    Stacked(Heads),
    /// The query, key and value of each head in turn (GPT-NeoX, Bloom).
    PerHead(Heads),
    /// For each key head its queries, the key and the value (Falcon's new decoder).
    PerGroup(Heads),
    /// All rows: the module has its queries, the key and the value for each key head, the tensor all
    /// queries, then all keys, then all values (GPT-NeoX, Bloom and Falcon in GGUF).
    Regrouped,
}

/// Which heads of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Heads {
    /// Queries.
    Query,
    /// Keys; as many as values.
    Key,
    /// Values.
    Value,
}

/// The heads of a model, as far as they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attention {
    /// Number of query heads.
    pub query: Option<usize>,
    /// Number of key heads.
    pub key: Option<usize>,
}

impl Attention {
    fn pair(self) -> Option<(usize, usize)> {
        // No model has as many heads; their sums cannot overflow.
        const MOST: usize = 1 << 16;
        let query = self.query.filter(|count| (1..=MOST).contains(count))?;
        let key = self.key.unwrap_or(query);
        (key > 0 && query % key == 0).then_some((query, key))
    }
}

impl Rows {
    /// Whether the numbers of heads are needed to tell the rows.
    pub fn needs_heads(self) -> bool {
        matches!(
            self,
            Rows::Pairs(_)
                | Rows::Stacked(_)
                | Rows::PerHead(_)
                | Rows::PerGroup(_)
                | Rows::Regrouped
        )
    }

    /// Whether the width of the tensor is needed to tell the rows.
    pub fn needs_columns(self) -> bool {
        matches!(
            self,
            Rows::Square { .. } | Rows::Rest { .. } | Rows::SwappedPair
        )
    }

    /// The rows of a tensor of `rows` × `columns` that are the module's, in the module's order;
    /// `None` where the shape does not allow it or the heads are not known.
    pub fn ranges(
        self,
        rows: usize,
        columns: usize,
        attention: Attention,
    ) -> Option<Vec<Range<usize>>> {
        let block = |index: usize, size: usize| {
            let end = size.checked_mul(index + 1).filter(|end| *end <= rows)?;
            (size > 0).then(|| one(end - size..end))
        };
        // The heads of one kind, `size` rows each, in groups of `group` heads of any kind.
        let strided = |groups: usize, group: usize, first: usize, count: usize| {
            let size = rows.checked_div(groups.checked_mul(group)?)?;
            let exact = size > 0 && size * groups * group == rows;
            let run = |at: usize| {
                let start = (at * group + first) * size;
                start..start + count * size
            };
            exact.then(|| (0..groups).map(run).collect())
        };
        match self {
            Rows::Whole | Rows::Transposed | Rows::Conv1D => Some(one(0..rows)),
            Rows::Block { index, of } => {
                block(index, rows / of.max(1)).filter(|_| rows.is_multiple_of(of))
            }
            Rows::Blocks { index, count, of } => {
                let size = rows / of.max(1);
                let whole = size > 0 && rows.is_multiple_of(of) && index + count <= of;
                whole.then(|| one(index * size..(index + count) * size))
            }
            Rows::Square { index } => block(index, columns),
            Rows::Rest { after } => {
                let start = after.checked_mul(columns).filter(|start| *start < rows)?;
                Some(one(start..rows))
            }
            Rows::Swapped => rows
                .is_multiple_of(2)
                .then(|| vec![rows / 2..rows, 0..rows / 2]),
            Rows::SwappedPair if Some(rows) == columns.checked_mul(2) => {
                Rows::Swapped.ranges(rows, columns, attention)
            }
            Rows::SwappedPair => Some(one(0..rows)),
            Rows::Expert { .. } => None, // rows of a stack: its own shape tells
            Rows::Pairs(heads) => {
                let (query, key) = attention.pair()?;
                let count = if heads == Heads::Query { query } else { key };
                let size = rows / count;
                let exact = size * count == rows && size.is_multiple_of(2);
                let row = |row: usize| {
                    let (head, within) = (row / size, row % size);
                    let at = head * size + (within % (size / 2)) * 2 + within / (size / 2);
                    at..at + 1
                };
                exact.then(|| (0..rows).map(row).collect())
            }
            Rows::Stacked(heads) => {
                let (query, key) = attention.pair()?;
                let all = query + 2 * key;
                let (first, count) = match heads {
                    Heads::Query => (0, query),
                    Heads::Key => (query, key),
                    Heads::Value => (query + key, key),
                };
                strided(1, all, first, count)
            }
            Rows::PerHead(heads) => strided(attention.pair()?.0, 3, heads as usize, 1),
            Rows::PerGroup(heads) => {
                let (query, key) = attention.pair()?;
                let queries = query / key;
                let (first, count) = match heads {
                    Heads::Query => (0, queries),
                    Heads::Key => (queries, 1),
                    Heads::Value => (queries + 1, 1),
                };
                strided(key, queries + 2, first, count)
            }
            Rows::Regrouped => {
                let (query, key) = attention.pair()?;
                let (queries, all) = (query / key, query + 2 * key);
                let size = rows / all;
                let heads = |first: usize, count: usize| first * size..(first + count) * size;
                let group = |group: usize| {
                    [
                        heads(group * queries, queries),
                        heads(query + group, 1),
                        heads(query + key + group, 1),
                    ]
                };
                let exact = size > 0 && size * all == rows;
                exact.then(|| (0..key).flat_map(group).collect())
            }
        }
    }
}

fn one(range: Range<usize>) -> Vec<Range<usize>> {
    std::iter::once(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPED: Attention = Attention {
        query: Some(4),
        key: Some(2),
    };

    #[test]
    fn the_parts_of_a_fused_tensor_cover_it_once() {
        for part in [Rows::Stacked, Rows::PerHead, Rows::PerGroup] {
            let attention = match part(Heads::Query) {
                Rows::PerHead(_) => Attention {
                    query: Some(4),
                    key: Some(4),
                },
                _ => GROUPED,
            };
            let mut rows: Vec<usize> = [Heads::Query, Heads::Key, Heads::Value]
                .into_iter()
                .flat_map(|heads| part(heads).ranges(24, 8, attention).expect("it divides"))
                .flatten()
                .collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..24).collect::<Vec<_>>());
        }
    }

    #[test]
    fn groups_of_heads_are_taken_from_blocks_of_one_kind() {
        let rows = Rows::Regrouped.ranges(16, 4, GROUPED);
        let expected = vec![0..4, 8..10, 12..14, 4..8, 10..12, 14..16];
        assert_eq!(rows, Some(expected));
        assert_eq!(Rows::Regrouped.ranges(15, 4, GROUPED), None);
    }

    #[test]
    fn absurd_numbers_of_heads_have_no_parts() {
        let absurd = Attention {
            query: Some(usize::MAX),
            key: Some(1),
        };
        for rows in [
            Rows::Pairs(Heads::Query),
            Rows::Stacked(Heads::Key),
            Rows::PerHead(Heads::Key),
            Rows::PerGroup(Heads::Key),
            Rows::Regrouped,
        ] {
            assert_eq!(rows.ranges(24, 8, absurd), None, "{rows:?}");
        }
    }

    #[test]
    fn rotary_halves_are_interleaved_within_each_head() {
        let rows = Rows::Pairs(Heads::Key).ranges(8, 4, GROUPED);
        let starts: Vec<usize> = rows.expect("it divides").iter().map(|r| r.start).collect();
        assert_eq!(starts, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn shapes_that_do_not_divide_have_no_parts() {
        let none = Attention::default();
        assert_eq!(Rows::Block { index: 0, of: 3 }.ranges(10, 4, none), None);
        assert_eq!(Rows::Rest { after: 3 }.ranges(12, 4, none), None);
        let blocks = |index, count| Rows::Blocks {
            index,
            count,
            of: 5,
        };
        assert_eq!(blocks(0, 3).ranges(10, 4, none), Some(one(0..6)));
        assert_eq!(blocks(4, 1).ranges(10, 4, none), Some(one(8..10)));
        assert_eq!(blocks(4, 1).ranges(11, 4, none), None);
        assert_eq!(blocks(4, 2).ranges(10, 4, none), None);
        assert_eq!(Rows::Pairs(Heads::Query).ranges(8, 8, none), None);
        assert_eq!(Rows::Swapped.ranges(7, 1, none), None);
        assert_eq!(Rows::Square { index: 3 }.ranges(12, 4, none), None);
    }
}
