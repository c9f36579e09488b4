//! A machine as options of the command line: what [`options`](super::options) makes of them is the machine again.

use std::path::Path;

use vtd::Stages;

use crate::commands::cli::RunArgs;
use crate::config::{Backend, DeviceKind, DeviceOption, IommuOption, UserSocket, VirtioKind, VtdOption, WorkerOption};
use crate::machine::Machine;

fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// `--iommu`.
fn iommu(option: &IommuOption) -> String {
    let IommuOption::Vtd(vtd) = option else { return "none".to_owned() };
    let VtdOption {
        dma_translation,
        aw_bits,
        caching_mode,
        pass_through,
        interrupt_remapping,
        extended_interrupt_mode,
        posted_interrupts,
        scalable,
        nested,
        second_stage_dirty,
        pasid_bits,
        device_tlb,
        page_requests,
        performance_counters,
        worker,
        ioapic_check,
        devices,
        segment,
    } = vtd;
    let mut text = "vtd".to_owned();
    if let Some(bits) = aw_bits {
        text += &format!(",aw-bits={bits}");
    }
    let stage = scalable.map(|stages| match stages {
        Stages::First => "first",
        Stages::Second => "second",
        Stages::Both => "both",
    });
    text += &format!(",scalable={}", switch(stage.is_some()));
    if let Some(stage) = stage {
        text += &format!(",stage={stage}");
    }
    for (key, on) in [
        ("dma-translation", dma_translation),
        ("caching-mode", caching_mode),
        ("pt", pass_through),
        ("intremap", interrupt_remapping),
        ("eim", extended_interrupt_mode),
        ("posted", posted_interrupts),
        ("nest", nested),
        ("slads", second_stage_dirty),
        ("ats", device_tlb),
        ("pri", page_requests),
        ("perf", performance_counters),
        ("ioapic-check", ioapic_check),
    ] {
        text += &format!(",{key}={}", switch(*on));
    }
    let worker = match worker {
        WorkerOption::Off => "off",
        WorkerOption::On => "on",
        WorkerOption::Always => "always",
    };
    text += &format!(",pasid-bits={pasid_bits},worker={worker}");
    if *segment != 0 {
        text += &format!(",segment={segment}");
    }
    if devices.is_empty() { text } else { text + ",devices=" + &devices.join("+") }
}

/// A path that is the same in every working directory, as text.
fn path(path: &Path) -> Result<String, String> {
    let whole = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
    whole.into_os_string().into_string().map_err(|path| format!("{} is not text", path.display()))
}

/// `--device`.
fn device(option: &DeviceOption) -> Result<String, String> {
    let DeviceOption { id, addr, port, bus, kind } = option;
    let mut text = kind.name().to_owned();
    match kind {
        DeviceKind::Vfio { host, backend } => {
            text += &format!(",host={host}");
            match backend {
                None => {}
                Some(Backend::Type1) => text += ",backend=type1",
                Some(Backend::Iommufd) => text += ",backend=iommufd",
            }
        }
        DeviceKind::VfioUser { socket, confine } => {
            match socket {
                UserSocket::Path(socket) => text += &format!(",socket={}", path(socket)?),
                UserSocket::Fd(fd) => text += &format!(",fd={fd}"),
            }
            text += &format!(",confine={}", switch(*confine));
        }
        DeviceKind::Edu { pasid, ats, pri } => {
            text += &format!(",pasid={}", switch(*pasid));
            text += if *ats { ",ats=on" } else { "" };
            text += if *pri { ",pri=on" } else { "" };
        }
        DeviceKind::PciBridge => {}
        DeviceKind::PinBlk { file, direct } => {
            if let Some(file) = file {
                text += &format!(",file={}", path(file)?);
                text += if *direct { ",direct=on" } else { "" };
            }
        }
        DeviceKind::Virtio(VirtioKind::Rng | VirtioKind::Console) => {}
        DeviceKind::Virtio(VirtioKind::Blk { file, read_only }) => {
            text += &format!(",file={},readonly={}", path(file)?, switch(*read_only));
        }
        DeviceKind::Virtio(VirtioKind::Net { tap, mac }) => {
            text += &format!(",tap={tap}");
            if let Some([a, b, c, d, e, f]) = mac {
                text += &format!(",mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
            }
        }
    }
    if let Some(addr) = addr {
        text += &format!(",addr={addr}");
    }
    if let Some(port) = port {
        text += &format!(",port={port}");
    }
    if let Some(bus) = bus {
        text += &format!(",bus={bus}");
    }
    if let Some(id) = id {
        text += &format!(",id={id}");
    }
    Ok(text)
}

/// The options of a machine that runs with `args`, as it is now.
///
/// # Errors
/// A sentence that says which of them has no text.
pub fn machine(args: &RunArgs, machine: &Machine) -> Result<Vec<String>, String> {
    let RunArgs { kernel, image, initrd, cmdline, memory, cpus, iommu: units, root_ports, .. } = args;
    let mut words = Vec::new();
    let mut say = |option: &str, value: String| words.push(format!("--{option}={value}"));
    for (option, file) in [("kernel", kernel), ("image", image), ("initrd", initrd)] {
        if let Some(file) = file {
            say(option, path(file)?);
        }
    }
    if let Some(cmdline) = cmdline {
        say("cmdline", cmdline.clone());
    }
    say("memory", memory.to_string());
    say("cpus", cpus.to_string());
    say("root-ports", root_ports.to_string());
    // What was left to the host is as it was on this one.
    let width = machine.unit_width();
    for unit in units {
        say(
            "iommu",
            match unit {
                IommuOption::Vtd(vtd) => {
                    iommu(&IommuOption::Vtd(VtdOption { aw_bits: width.or(vtd.aw_bits), ..vtd.clone() }))
                }
                IommuOption::None => iommu(unit),
            },
        );
    }
    for option in machine.device_options() {
        say("device", device(&option)?);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a14_options_come_back_from_their_text_as_they_were() {
        for text in [
            "none",
            "vtd",
            "vtd,aw-bits=39,caching-mode=off,intremap=off,pt=off,ioapic-check=off",
            "vtd,aw-bits=57,eim=off,scalable=on,stage=both,nest=on,slads=on,pasid-bits=20",
            "vtd,dma-translation=off,aw-bits=39",
            "vtd,scalable=on,stage=first",
            "vtd,posted=on",
            "vtd,worker=on",
            "vtd,worker=always",
            "vtd,scalable=on,ats=on,pri=on,perf=on,devices=a+05.0",
            "vtd,scalable=on",
            "vtd,segment=3,devices=0003:00:02.0+b",
        ] {
            let option: IommuOption = text.parse().unwrap();
            assert_eq!(iommu(&option).parse(), Ok(option), "{text}");
        }
        for text in [
            "edu",
            "edu,pasid=on,addr=1e.7,id=a",
            "edu,ats=on,pri=on",
            "edu,addr=0007:00:02.0",
            "edu,bus=b",
            "pcie-pci-bridge,id=b",
            "vfio,host=0001:02:03.4,backend=iommufd,port=3",
            "vfio-user,socket=/a/b,confine=on",
            "vfio-user,fd=7",
            "pinblk",
            "pinblk,file=/a,direct=on",
            "virtio-rng,port=1",
            "virtio-console",
            "virtio-blk,file=/a b,readonly=on",
            "virtio-net,tap=t0",
            "virtio-net,tap=t0,mac=52:54:00:0a:0b:0c",
        ] {
            let option: DeviceOption = text.parse().unwrap();
            assert_eq!(device(&option).unwrap().parse(), Ok(option), "{text}");
        }
    }
}
