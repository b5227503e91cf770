//! Dotted paths.

/// Segments that compilers and sharders leave in names.
const WRAPPERS: &[&str] = &[
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_module",
];

/// The path without the wrappers of `torch.compile`, FSDP, checkpointing and (in front) DataParallel.
///
/// ```
/// use loratool::naming::path::without_wrappers;
/// assert_eq!(without_wrappers("module._orig_mod.model.layers.0"), "model.layers.0");
/// ```
pub fn without_wrappers(path: &str) -> String {
    let path = path.strip_prefix("module.").unwrap_or(path);
    let segments: Vec<&str> = path
        .split('.')
        .filter(|segment| !WRAPPERS.contains(segment))
        .collect();
    segments.join(".")
}

/// The last segment.
pub fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// A number as names of layers have it: digits alone, without a sign or leading zeros.
///
/// ```
/// use loratool::naming::path::number;
/// assert_eq!(number("12"), Some(12));
/// assert_eq!((number("+1"), number("01")), (None, None));
/// ```
pub fn number(segment: &str) -> Option<usize> {
    let number: usize = segment.parse().ok()?;
    (number.to_string() == segment).then_some(number)
}

/// The path with every number replaced by `*`, so that the same module of all layers has one name.
///
/// ```
/// assert_eq!(loratool::naming::path::kind("model.layers.12.mlp.down_proj"), "model.layers.*.mlp.down_proj");
/// ```
pub fn kind(path: &str) -> String {
    let segment = |segment: &str| match segment.bytes().all(|byte| byte.is_ascii_digit())
        && !segment.is_empty()
    {
        true => "*".to_owned(),
        false => segment.to_owned(),
    };
    path.split('.').map(segment).collect::<Vec<_>>().join(".")
}

/// What models call their `nn.Embedding`s. Layers of image models that are called `x_embedder` or
/// `patch_embed` are linear.
///
/// Source: `huggingface/transformers` 5.23.0, `models/*/modeling_*.py`: names that are an `nn.Embedding` in several
/// models and a linear layer in none.
const EMBEDDINGS: &[&str] = &[
    "embed_tokens",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "position_embedding",
    "shared",
    "token_embedding",
    "wte",
    "wpe",
    "embed_positions",
    "tok_embeddings",
    "embed_in",
    "embed_audio_tokens",
    "embeddings",
    "embedding",
];

/// Whether a path is that of an embedding, where the module does not say it: names alone tell, for the factors of a
/// square weight do not.
pub fn is_embedding(module: &str) -> bool {
    EMBEDDINGS.contains(&leaf(module))
}
