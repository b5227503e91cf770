//! One integration binary, a module per room.

mod goldens;
mod support;
