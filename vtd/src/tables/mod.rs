//! The guest's tables, as they are walked.

pub(crate) mod blocked;
pub(crate) mod cached;
pub(crate) mod context;
pub(crate) mod first_stage;
pub(crate) mod flags;
pub(crate) mod interrupt;
pub(crate) mod nested;
mod pasid;
mod posted;
#[cfg(test)]
mod posted_test;
pub(crate) mod resolve;
pub(crate) mod second_stage;
