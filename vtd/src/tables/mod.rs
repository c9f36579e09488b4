//! The guest's tables, as they are walked.

pub(crate) mod context;
pub(crate) mod interrupt;
mod pasid;
pub(crate) mod second_stage;
