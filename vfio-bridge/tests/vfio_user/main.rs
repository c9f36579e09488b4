//! vfio-user: both ends of ours against each other, each against the other side of another implementation, and against
//! processes that misbehave.

mod both_ends;
mod confined;
mod dirty;
mod messages;
mod migration;
mod misbehaving;
mod negotiation;
mod other_implementations;
mod rig;
