//! The unit as a guest and a listener see it. Tests are named by the behaviours that they show.

mod queue;
mod registers;
mod rig;
mod shadowing;
