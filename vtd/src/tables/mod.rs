//! The guest's tables, as they are walked.

pub(crate) mod context;
pub(crate) mod interrupt;
pub(crate) mod second_stage;
