//! The locks of what decides whether a function's BARs are reached: [`Bus`](crate::Bus), the decoder of BARs, an
//! assigned function's gates, and a root port. The models (`tests/models`) compile the same code over loom's, and check
//! the order in which they are taken.

pub(crate) use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
