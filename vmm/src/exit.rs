//! Exit codes (docs/running.md).

/// Exit code of `causeway ctl` for what the machine refuses.
pub const DENIED: u8 = 1;
/// Exit code of a usage error.
pub const USAGE: u8 = 2;
/// Exit code of a refused start, and of `causeway ctl` where no machine is.
pub const REFUSED: u8 = 4;
/// Exit code of an error of the host or of ours.
pub const ERROR: u8 = 6;
/// Exit code of a crashed guest.
pub const CRASHED: u8 = 8;
/// Exit code of the time limit.
pub const TIME_LIMIT: u8 = 10;
/// Exit code of `causeway ctl PATH iommu mappings` that found differences.
pub const DIFFERS: u8 = 8;
