//! The unit as a guest and a listener see it. Tests are named by the behaviours that they show.

mod rig;
mod shadowing;
