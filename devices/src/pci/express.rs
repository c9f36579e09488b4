//! What a function's PCI Express capability says of its place (PCI Express base specification 5.0, section 7.5.3).

/// What is above a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Upstream {
    /// Nothing: it is on the root bus, and so integrated into the root complex. It has no link.
    #[default]
    RootComplex,
    /// A root port.
    Port,
    /// A bridge to conventional PCI, below which there is no PCI Express.
    Bridge,
}

/// Device/Port Type of an endpoint.
pub const ENDPOINT: u8 = 0;
/// Of a legacy endpoint, which is never integrated into a root complex (section 1.3.2.3).
pub const LEGACY_ENDPOINT: u8 = 1;
/// Of an endpoint that is integrated into the root complex.
pub const INTEGRATED_ENDPOINT: u8 = 9;
/// A link of one lane at 2.5 GT/s: what Link Capabilities can say, and what Link Status does.
pub const SLOWEST_LINK: u8 = 0x11;

impl Upstream {
    /// Device/Port Type of an endpoint that is there; `None`: it has no capability of PCI Express.
    pub fn endpoint(self) -> Option<u8> {
        match self {
            Self::RootComplex => Some(INTEGRATED_ENDPOINT),
            Self::Port => Some(ENDPOINT),
            Self::Bridge => None,
        }
    }
}
