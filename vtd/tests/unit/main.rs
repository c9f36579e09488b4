//! The unit as a guest and a listener see it. Tests are named by the behaviours that they show.

mod bounds;
mod callbacks;
mod conditions;
mod dirty;
mod edits;
mod endpoints;
mod faults;
mod first_stage;
mod floods;
mod layout;
mod memory_changes;
mod nested;
mod pasid_tables;
mod pasids;
mod queue;
mod random;
mod registers;
mod remapping;
mod renumber;
mod rig;
mod saving;
mod scalable;
mod scalable_faults;
mod scalable_random;
mod second_stage_flags;
mod shadowing;
