//! Bit layouts only, one file a family of structures; behaviour stands beside this folder.
//!
//! Section numbers are those of the Intel Virtualization Technology for Directed I/O architecture specification,
//! revision 4.1 (chapter 9: memory-resident structures, chapter 11: registers, section 6.5.2: descriptors).

pub mod ats;
pub mod fault;
pub mod first_stage;
pub mod invalidation;
pub mod irte;
pub mod page_requests;
pub mod pasid;
pub mod performance;
pub mod registers;
pub mod root_context;
pub mod second_stage;

use crate::range::IovaRange;

/// The interrupt address range: a write there is an interrupt and is never translated (section 3.14).
pub const INTERRUPT_WINDOW: IovaRange = IovaRange::new(0xfee0_0000, 0xfeef_ffff);
