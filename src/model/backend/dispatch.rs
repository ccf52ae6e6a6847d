//! From the name of a backend to its type.

/// Evaluates an expression with a type alias for the backend of a
/// [`BackendKind`](crate::ops::BackendKind): the one place that lists all backends.
macro_rules! with_backend {
    ($kind:expr, $backend:ident => $value:expr) => {
        match $kind {
            $crate::ops::BackendKind::Cpu => {
                type $backend = $crate::model::backend::Cpu;
                $value
            }
            $crate::ops::BackendKind::Reference => {
                type $backend = $crate::model::backend::Reference;
                $value
            }
        }
    };
}
pub(crate) use with_backend;
