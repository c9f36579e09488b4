//! Bit layouts only, one file a family of structures; behaviour stands beside this folder.
//!
//! Section numbers are those of the Intel Virtualization Technology for Directed I/O architecture specification,
//! revision 4.1 (chapter 9: memory-resident structures, chapter 11: registers, section 6.5.2: descriptors).

pub mod fault;
pub mod invalidation;
pub mod irte;
pub mod registers;
pub mod root_context;
pub mod second_stage;

/// First address of the interrupt address range (section 3.14).
pub const INTERRUPT_FIRST: u64 = 0xfee0_0000;
/// Last address of the interrupt address range, inclusive.
pub const INTERRUPT_LAST: u64 = 0xfeef_ffff;
