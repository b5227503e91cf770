//! What has no place in the base: collected, and reported together.

use std::path::Path;

use crate::error::{Error, Reason, Result};
use crate::naming::Resolver;
use crate::notice::{Notice, NoticeKind};

/// What has no place in the base.
#[derive(Default)]
pub(super) struct Missing {
    unresolved: Vec<String>,
    ambiguous: Vec<String>,
    pub(super) names: Vec<String>,
}

impl Missing {
    pub(super) fn unresolved(&mut self, resolver: &Resolver, name: &str) {
        // Looking for near names costs a walk over the base, so only the first cases get it.
        let near = if self.unresolved.len() < 20 {
            resolver.nearest(name, 3)
        } else {
            Vec::new()
        };
        self.names.push(name.to_owned());
        self.unresolved.push(match near.is_empty() {
            true => name.to_owned(),
            false => format!("{name} (nearest: {})", near.join(", ")),
        });
    }

    pub(super) fn ambiguous(&mut self, name: &str, names: &[String]) {
        self.ambiguous.push(format!("{name}: {}", names.join(", ")));
    }

    /// A notice for everything that is left out.
    ///
    /// # Errors
    /// [`Reason::Ambiguous`], and [`Reason::Modules`] where nothing may be left out.
    pub(super) fn report(&mut self, base: &Path, allow: bool) -> Result<Vec<Notice>> {
        let fail = |reason, cases: &mut Vec<String>| {
            Error::new(reason)
                .in_file(base)
                .with_cases(std::mem::take(cases))
        };
        if !self.ambiguous.is_empty() {
            let count = self.ambiguous.len();
            return Err(fail(Reason::Ambiguous { count }, &mut self.ambiguous));
        }
        if !self.unresolved.is_empty() && !allow {
            let count = self.unresolved.len();
            let error = fail(Reason::Modules { count }, &mut self.unresolved);
            return Err(error.with_hint(
                "is this the base the adapter was trained on? --allow-unmatched leaves these parts out",
            ));
        }
        let notice = |name: &String| {
            let text = "it has no place in the base and was left out";
            Notice::new(NoticeKind::LeftOut, text).on(&**name)
        };
        Ok(self.names.iter().map(notice).collect())
    }
}
