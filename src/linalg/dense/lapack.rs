//! LAPACK by way of `ndarray-linalg`.
