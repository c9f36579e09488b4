//! The capabilities of an edu that QEMU's has not, in extended configuration space. PCI Express 7.8.9, 10.5.1 and
//! 10.5.2.

use crate::pci::ConfigSpace;
use crate::pci::config::CAP_EXPRESS;
use crate::pci::express::{ENDPOINT, SLOWEST_LINK, Upstream};

/// Where extended configuration space begins.
const FIRST: u16 = 0x100;

/// PASID capability: the offset of its control register, and PASID Enable there.
const PASID_CONTROL: u16 = 6;
/// ATS capability: the offset of its control register.
const ATS_CONTROL: u16 = 6;
/// Enable of the ATS control register; STU is in bits 4:0.
const ATS_ENABLE: u16 = 1 << 15;
/// PRI capability: the offsets of its control and its status register.
const PRI_CONTROL: u16 = 4;
const PRI_STATUS: u16 = 6;
const PRI_ENABLE: u16 = 1;
const PRI_RESET: u16 = 2;
const PRI_FAILURE: u16 = 1;
const PRI_UNEXPECTED: u16 = 2;
const PRI_STOPPED: u16 = 1 << 8;
/// Page requests that may be outstanding: as many as there are transfers at a time.
const OUTSTANDING: u32 = 1;

/// Which capabilities there are, and where.
#[derive(Clone, Copy, Default)]
pub(super) struct Capabilities {
    pasid: Option<u16>,
    ats: Option<u16>,
    pri: Option<u16>,
}

/// What a write of configuration space turned off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Off {
    /// ATS is off.
    pub(super) ats: bool,
    /// Page requests are off, or were reset.
    pub(super) requests: bool,
}

impl Capabilities {
    /// Adds those that are asked for. With any of them the function is one of PCI Express below `upstream` that may
    /// send PASIDs of 20 bits as a prefix.
    pub(super) fn add(config: &mut ConfigSpace, upstream: Upstream, pasid: bool, ats: bool, pri: bool) -> Self {
        if !(pasid || ats || pri) {
            return Self::default();
        }
        let mut express = [0; 58];
        // Version 2, an endpoint of its place; its role-based error reporting.
        express[0] = 0x02 | upstream.endpoint().unwrap_or(ENDPOINT) << 4;
        express[3] = 0x80;
        if upstream != Upstream::RootComplex {
            // Link Capabilities and Link Status.
            (express[0x0a], express[0x10]) = (SLOWEST_LINK, SLOWEST_LINK);
        }
        // Device Capabilities 2: end-to-end prefixes, one at most.
        express[0x24] = 0x60;
        config.add_capability(CAP_EXPRESS, &express, &[]);
        let mut at = FIRST;
        let mut add = |id: u32, size: u16, is_last: bool| {
            let own = at;
            at += size;
            let next = if is_last { 0 } else { u32::from(at) };
            config.put(own, &(next << 20 | 1 << 16 | id).to_le_bytes());
            own
        };
        let pasid = pasid.then(|| add(0x1b, 0x10, !ats && !pri));
        let ats = ats.then(|| add(0x0f, 0x10, !pri));
        let pri = pri.then(|| add(0x13, 0x10, true));
        if let Some(at) = pasid {
            config.put(at + 4, &(20_u16 << 8).to_le_bytes());
            config.allow(at + PASID_CONTROL, &[1]);
        }
        if let Some(at) = ats {
            // 32 invalidations at a time, page aligned requests, invalidations of every PASID.
            config.put(at + 4, &0x60_u16.to_le_bytes());
            config.allow(at + ATS_CONTROL, &(ATS_ENABLE | 0x1f).to_le_bytes());
        }
        if let Some(at) = pri {
            // Responses have the PASID of their requests.
            config.put(at + PRI_STATUS, &(1_u16 << 15 | PRI_STOPPED).to_le_bytes());
            config.put(at + 8, &OUTSTANDING.to_le_bytes());
            config.allow(at + PRI_CONTROL, &PRI_ENABLE.to_le_bytes());
            config.clear_on_one(at + PRI_STATUS, &(PRI_FAILURE | PRI_UNEXPECTED).to_le_bytes());
            config.allow(at + 12, &u32::MAX.to_le_bytes());
        }
        Self { pasid, ats, pri }
    }

    /// Whether there is a PASID capability.
    pub(super) fn has_pasid(self) -> bool {
        self.pasid.is_some()
    }

    /// Whether there is an ATS capability.
    pub(super) fn has_ats(self) -> bool {
        self.ats.is_some()
    }

    /// PASID Enable.
    pub(super) fn sends_pasids(self, config: &ConfigSpace) -> bool {
        self.pasid.is_some_and(|at| config.u16(at + PASID_CONTROL) & 1 != 0)
    }

    /// Enable of ATS. The smallest translation unit may be anything: a page is one, and translations have their size.
    pub(super) fn translates(self, config: &ConfigSpace) -> bool {
        self.ats.is_some_and(|at| config.u16(at + ATS_CONTROL) & ATS_ENABLE != 0)
    }

    /// Page requests are sent: they are enabled, one may be outstanding, and none failed.
    pub(super) fn requests_pages(self, config: &ConfigSpace) -> bool {
        let may = |at: u16| {
            config.u16(at + PRI_CONTROL) & PRI_ENABLE != 0
                && config.u16(at + PRI_STATUS) & PRI_FAILURE == 0
                && config.u32(at + 12) >= OUTSTANDING
        };
        self.translates(config) && self.pri.is_some_and(may)
    }

    /// After a write of `data` at `offset`: what is off now, and the bits that follow.
    pub(super) fn written(self, config: &mut ConfigSpace, offset: u16, data: &[u8]) -> Off {
        let mut was_reset = false;
        if let Some(at) = self.pri {
            let enabled = config.u16(at + PRI_CONTROL) & PRI_ENABLE != 0;
            let byte = (at + PRI_CONTROL).checked_sub(offset).and_then(|index| data.get(usize::from(index)));
            // Reset has an effect while page requests are off.
            was_reset = !enabled && byte.is_some_and(|byte| u16::from(*byte) & PRI_RESET != 0);
            let status = config.u16(at + PRI_STATUS) & !PRI_STOPPED;
            config.put(at + PRI_STATUS, &(status | if enabled { 0 } else { PRI_STOPPED }).to_le_bytes());
        }
        Off { ats: !self.translates(config), requests: was_reset || !self.requests_pages(config) }
    }

    /// A response failed, or was unexpected: the status says so.
    pub(super) fn told(self, config: &mut ConfigSpace, failed: bool, unexpected: bool) {
        if let Some(at) = self.pri {
            let status = config.u16(at + PRI_STATUS);
            let failed = if failed { PRI_FAILURE } else { 0 };
            let unexpected = if unexpected { PRI_UNEXPECTED } else { 0 };
            config.put(at + PRI_STATUS, &(status | failed | unexpected).to_le_bytes());
        }
    }
}
