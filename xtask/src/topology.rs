//! The PCI functions of L1 that a guest can be given, and how they are connected.

use crate::l1::{Content, Images, SLICE_BYTES, SLICES_FROM};
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::path::Path;
use std::process::Command;

/// How the assignable functions are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Topology {
    /// edu 08.0, NVMe 09.0, e1000e 0a.0 and igb 0b.0 on the root bus
    Flat,
    /// each function behind a PCIe root port: bus reset, ACS, igb with SR-IOV
    Ports,
    /// two edu behind one PCIe-to-PCI bridge (one group), the NVMe on the root bus
    Bridge,
    /// two edu functions in one slot behind a root port without ACS (one group), the NVMe on the root bus
    Slot,
    /// one function of each kind that QEMU has and Linux drives
    Zoo,
    /// four NVMe with 65 vectors each, two with 2,048, and a function with a BAR of 128 GiB, on the root bus
    Large,
}

const EDU: &str = "edu,dma_mask=0xffffffffffffffff";
const NVME: &str = "nvme,drive=nvme,serial=causeway";
/// As many queue pairs and vectors as MSI-X can have. The other id tells them from the rest, in L1 as well as in
/// guests.
const NVME_MANY: &str = "nvme,max_ioqpairs=1024,msix_qsize=2048,use-intel-id=on";
/// Two virtual functions, whose queues and vectors its driver takes from the four and the two that are flexible.
const NVME_SRIOV: &str = "nvme,serial=sriov,subsys=subsystem,max_ioqpairs=6,msix_qsize=6,\
     sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2";

const ZOO_DISKS: &[&str] =
    &["ahci", "xhci", "ehci", "sdhci", "virtio_blk", "nvme_many", "nvme_sriov", "megasas", "ohci"];
const LARGE_DISKS: &[&str] = &["nvme1", "nvme2", "nvme3", "many0", "many1"];

impl Topology {
    /// The disks beside the NVMe, in the order of the slices that are their content.
    fn disks(self) -> &'static [&'static str] {
        match self {
            Self::Zoo => ZOO_DISKS,
            Self::Large => LARGE_DISKS,
            Self::Flat | Self::Ports | Self::Bridge | Self::Slot => &[],
        }
    }

    /// `NAME:SHA256` of the first MiB of each disk.
    pub fn contents(self, content: &Content) -> String {
        let slices = self.disks().iter().copied().zip(&content.slices);
        let all = std::iter::once(("nvme", &content.first)).chain(slices);
        all.map(|(name, sum)| format!("{name}:{sum}")).collect::<Vec<_>>().join(" ")
    }

    /// What is added to L1's model of processor.
    pub fn cpu(self) -> &'static str {
        match self {
            // Firmware then leaves all BARs below 4 GiB. Of the 64-bit BARs of igb's virtual functions, QEMU 10.0 takes
            // the lower half for the whole address: above 4 GiB nothing is there.
            Self::Zoo => ",phys-bits=36",
            Self::Flat | Self::Ports | Self::Bridge | Self::Slot | Self::Large => "",
        }
    }

    /// Adds the functions, and what they need, to QEMU's options.
    pub fn add_to(self, command: &mut Command, images: &Images) -> Result<()> {
        for (index, name) in self.disks().iter().enumerate() {
            let offset = SLICES_FROM + index * SLICE_BYTES;
            // Writes go to a file that is already deleted, in the run's folder.
            let more = format!("snapshot=on,offset={offset},size={SLICE_BYTES}");
            drive(command, name, &images.nvme, &more)?;
        }
        let mut device = |text: &str| {
            command.args(["-device", text]);
        };
        match self {
            Self::Flat => {
                device(&format!("{EDU},addr=08.0"));
                device(&format!("{NVME},addr=09.0"));
                device("e1000e,netdev=net0,addr=0a.0");
                device("igb,netdev=net1,addr=0b.0");
                hub(command, 2);
            }
            Self::Ports => {
                root_ports(command, &["edu", "nvme", "e1000e", "igb"]);
                let mut device = |text: &str| {
                    command.args(["-device", text]);
                };
                device(&format!("{EDU},bus=port-edu"));
                device(&format!("{NVME},bus=port-nvme"));
                device("e1000e,netdev=net0,bus=port-e1000e");
                device("igb,netdev=net1,bus=port-igb");
                hub(command, 2);
            }
            Self::Bridge => {
                device("pcie-pci-bridge,id=bridge,addr=10.0");
                device("pci-bridge,id=inner,bus=bridge,chassis_nr=1,shpc=off,addr=01.0");
                device(&format!("{EDU},bus=inner,addr=01.0"));
                device(&format!("{EDU},bus=inner,addr=02.0"));
                device(&format!("{NVME},addr=09.0"));
            }
            Self::Slot => {
                device("pcie-root-port,id=root-port,chassis=1,slot=1,addr=10.0");
                device(&format!("{EDU},bus=root-port,multifunction=on,addr=00.0"));
                device(&format!("{EDU},bus=root-port,addr=00.1"));
                device(&format!("{NVME},addr=09.0"));
            }
            Self::Zoo => zoo(command),
            Self::Large => {
                device(&format!("{NVME},addr=08.0"));
                for index in 1..4 {
                    device(&format!("nvme,drive=nvme{index},serial=nvme{index},addr=0{}.0", 8 + index));
                }
                device(&format!("{NVME_MANY},drive=many0,serial=many0,addr=0c.0"));
                device(&format!("{NVME_MANY},drive=many1,serial=many1,addr=0d.0"));
                device("pci-testdev,membar=128G,addr=0e.0");
            }
        }
        Ok(())
    }
}

fn zoo(command: &mut Command) {
    // The virtio functions are not on the root bus, where L1 would find their disk before its own.
    root_ports(command, &["e1000e", "igb", "nvme", "virtio-blk", "virtio-net"]);
    hub(command, 6);
    let devices = [
        "ich9-ahci,id=ahci,addr=04.0",
        "ide-hd,bus=ahci.0,drive=ahci",
        "qemu-xhci,id=xhci,addr=05.0",
        "usb-storage,bus=xhci.0,drive=xhci",
        "usb-ehci,id=ehci,addr=06.0",
        "usb-storage,bus=ehci.0,drive=ehci",
        "sdhci-pci,addr=07.0",
        "sd-card,drive=sdhci",
        &format!("{EDU},addr=08.0"),
        &format!("{NVME},addr=09.0"),
        "e1000,netdev=net0,romfile=,addr=0a.0",
        "rtl8139,netdev=net1,romfile=,addr=0b.0",
        "vmxnet3,netdev=net2,romfile=,addr=0c.0",
        "intel-hda,id=hda,addr=0d.0",
        "hda-duplex,bus=hda.0,audiodev=sound",
        "pci-serial,chardev=serial,addr=0e.0",
        &format!("{NVME_MANY},drive=nvme_many,serial=many,addr=11.0"),
        // Not pvscsi: QEMU's takes its rings' addresses for physical ones, whatever IOMMU it is behind.
        "megasas,id=megasas,addr=12.0",
        "scsi-hd,bus=megasas.0,drive=megasas",
        "pci-ohci,id=ohci,addr=13.0",
        "usb-storage,bus=ohci.0,drive=ohci",
        "virtio-rng-pci,disable-legacy=on,iommu_platform=on,addr=14.0",
        "e1000e,netdev=net3,romfile=,bus=port-e1000e",
        "igb,netdev=net4,romfile=,bus=port-igb",
        "nvme-subsys,id=subsystem,nqn=sriov",
        &format!("{NVME_SRIOV},id=sriov,bus=port-nvme"),
        "nvme-ns,bus=sriov,drive=nvme_sriov",
        "virtio-blk-pci,drive=virtio_blk,iommu_platform=on,bus=port-virtio-blk",
        "virtio-net-pci,netdev=net5,romfile=,iommu_platform=on,bus=port-virtio-net",
    ];
    command.args(["-audiodev", "none,id=sound", "-chardev", "null,id=serial"]);
    for device in devices {
        command.args(["-device", device]);
    }
}

/// A root port with native hot-plug for each name.
fn root_ports(command: &mut Command, names: &[&str]) {
    // Where ACPI is to plug and unplug, QEMU's ports never say that their link is up, and Linux takes each reset of
    // their buses for failed.
    command.args(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]);
    for (index, name) in names.iter().enumerate() {
        let more = if index == 0 { ",multifunction=on" } else { "" };
        let number = index + 1;
        command.args([
            "-device",
            &format!("pcie-root-port,id=port-{name},chassis={number},slot={number},addr=10.{index}{more}"),
        ]);
    }
}

/// One hub, so that a guest behind one of the functions and L1 behind another can talk.
fn hub(command: &mut Command, ports: usize) {
    for port in 0..ports {
        command.args(["-netdev", &format!("hubport,id=net{port},hubid=0")]);
    }
}

/// A raw image as a drive for a `-device`.
pub fn drive(command: &mut Command, id: &str, file: &Path, more: &str) -> Result<()> {
    command.arg("-drive").arg(format!("file={},if=none,id={id},format=raw,{more}", option(file)?));
    Ok(())
}

/// A path as the value of a QEMU option, in which a comma is doubled.
pub fn option(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8, which QEMU's options need", path.display()))?;
    Ok(text.replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_has_a_slice_and_a_checksum_of_its_own() {
        let slices: Vec<String> = (0..crate::l1::SLICES).map(|slice| format!("sum{slice}")).collect();
        let content = Content { sha256: "whole".to_owned(), first: "first".to_owned(), slices };
        assert_eq!(Topology::Flat.contents(&content), "nvme:first");
        for topology in [Topology::Zoo, Topology::Large] {
            let text = topology.contents(&content);
            let disks: Vec<(&str, &str)> = text.split(' ').filter_map(|disk| disk.split_once(':')).collect();
            assert_eq!(disks.len(), topology.disks().len() + 1, "{text}");
            for (index, (name, sum)) in disks.iter().enumerate() {
                assert!(disks[..index].iter().all(|other| other.0 != *name && other.1 != *sum), "{text}");
            }
        }
    }
}
