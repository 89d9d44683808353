//! Plans for a model that need not exist, on a machine that need not be here.

pub mod model_shape;
pub mod question;
