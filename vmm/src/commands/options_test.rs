use vfio_bridge::Bdf;

use super::*;
use crate::config::{BusNumbers, segments};

fn error<T: std::str::FromStr<Err = BadOption>>(text: &str) -> String {
    match text.parse::<T>() {
        Ok(_) => panic!("`{text}` was accepted"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn numbers_and_sizes() {
    for (text, value) in [("0", 0), ("10", 10), ("0x1F", 31), ("18446744073709551615", u64::MAX)] {
        assert_eq!(number(text), Ok(value));
    }
    for (text, value) in [("512M", 512 << 20), ("4g", 4 << 30), ("0x10K", 16 << 10), ("4096", 4096), ("1T", 1 << 40)] {
        assert_eq!(size(text), Ok(value));
    }
    for text in ["", "M", "1P", "-1", "+1", "0x", "0x+1", "1.5G", "18446744073709551615K", "17179869184G", "16777216T"]
    {
        assert!(size(text).is_err(), "{text}");
    }
    assert_eq!(memory("512M"), Ok(512 << 20));
    for text in ["15M", "16777217", "65T", "100000G"] {
        assert!(memory(text).is_err(), "{text}");
    }
}

#[test]
fn iommu_keys() {
    assert_eq!("none".parse(), Ok(IommuOption::None));
    assert_eq!("vtd".parse(), Ok(IommuOption::Vtd(VtdOption::default())));
    assert_eq!(
        "vtd,aw-bits=0x27,caching-mode=off,pt=off,intremap=off,ioapic-check=off,scalable=on,perf=on".parse(),
        Ok(IommuOption::Vtd(VtdOption {
            dma_translation: true,
            aw_bits: Some(39),
            caching_mode: false,
            pass_through: false,
            interrupt_remapping: false,
            extended_interrupt_mode: false,
            posted_interrupts: false,
            scalable: Some(Stages::Second),
            nested: false,
            second_stage_dirty: false,
            pasid_bits: 0,
            device_tlb: false,
            page_requests: false,
            performance_counters: true,
            worker: WorkerOption::Off,
            ioapic_check: false,
            devices: vec![],
            segment: 0,
        }))
    );
    let (scalable, nested, second_stage_dirty, pasid_bits) = (Some(Stages::Both), true, true, 20);
    let expected = VtdOption { scalable, nested, second_stage_dirty, pasid_bits, ..VtdOption::default() };
    assert_eq!("vtd,scalable=on,stage=both,nest=on,slads=on,pasid-bits=0x14".parse(), Ok(IommuOption::Vtd(expected)));
    let expected =
        VtdOption { scalable: Some(Stages::Second), device_tlb: true, page_requests: true, ..VtdOption::default() };
    assert_eq!("vtd,scalable=on,ats=on,pri=on".parse(), Ok(IommuOption::Vtd(expected)));
    let expected = VtdOption { dma_translation: false, pass_through: false, ..VtdOption::default() };
    assert_eq!("vtd,dma-translation=off".parse(), Ok(IommuOption::Vtd(expected)));
    for (text, interrupt_remapping, extended_interrupt_mode) in [
        ("vtd", true, true),
        ("vtd,eim=on", true, true),
        ("vtd,intremap=on", true, true),
        ("vtd,intremap=on,eim=off", true, false),
        ("vtd,eim=off,intremap=off", false, false),
    ] {
        let expected = VtdOption { interrupt_remapping, extended_interrupt_mode, ..VtdOption::default() };
        assert_eq!(text.parse(), Ok(IommuOption::Vtd(expected)), "{text}");
    }
    let expected = VtdOption { posted_interrupts: true, ..VtdOption::default() };
    assert_eq!("vtd,posted=on".parse(), Ok(IommuOption::Vtd(expected)));
    for (text, worker) in [("off", WorkerOption::Off), ("on", WorkerOption::On), ("always", WorkerOption::Always)] {
        let expected = VtdOption { worker, ..VtdOption::default() };
        assert_eq!(format!("vtd,worker={text}").parse(), Ok(IommuOption::Vtd(expected)));
    }
    for (text, stages) in [("second", Stages::Second), ("first", Stages::First), ("both", Stages::Both)] {
        let expected = VtdOption { scalable: Some(stages), ..VtdOption::default() };
        assert_eq!(format!("vtd,scalable=on,stage={text}").parse(), Ok(IommuOption::Vtd(expected)));
    }
    for (text, part) in [
        ("vtd,aw-bits=40", "not 39, 48 or 57"),
        ("vtd,foo=1", "the keys are ats, aw-bits, caching-mode"),
        ("vtd,pt=on,pt=on", "given twice; the keys are ats, aw-bits"),
        ("vtd,pt", "not key=value"),
        ("vtd,", "not key=value"),
        ("vtd,pt=yes", "`on` or `off`"),
        ("none,pt=on", "unknown key"),
        ("smmu", "vtd or none"),
        ("vtd,intremap=off,eim=on", "eim=on needs intremap=on"),
        ("vtd,intremap=off,posted=on", "posted=on needs intremap=on"),
        ("vtd,scalable=yes", "`on` or `off` is expected"),
        ("vtd,stage=first", "stage needs scalable=on"),
        ("vtd,scalable=on,nest=on", "nest=on needs scalable=on,stage=both"),
        ("vtd,slads=on", "slads=on needs scalable=on"),
        ("vtd,dma-translation=off,intremap=off", "dma-translation=off needs intremap=on"),
        ("vtd,dma-translation=off,scalable=on", "none of scalable, ats, perf and pt"),
        ("vtd,dma-translation=off,ats=on", "none of scalable, ats, perf and pt"),
        ("vtd,dma-translation=off,perf=on", "none of scalable, ats, perf and pt"),
        ("vtd,dma-translation=off,pt=on", "none of scalable, ats, perf and pt"),
        ("vtd,worker=yes", "`yes` is not off, on or always"),
        ("vtd,worker=on,ats=on", "worker needs ats=off"),
        ("vtd,segment=8", "segments are 0 to 7"),
        ("vtd,segment=0x10001", "segments are 0 to 7"),
        ("vtd,devices=0008:00:02.0", "segments are 0 to 7"),
        ("vtd,devices=", "is not a name"),
        ("vtd,devices=a++b", "is not a name"),
        ("vtd,scalable=on,stage=first,slads=on", "slads=on needs scalable=on"),
        ("vtd,pasid-bits=4", "pasid-bits needs scalable=on"),
        ("vtd,scalable=on,pri=on", "pri=on needs ats=on,scalable=on"),
        ("vtd,ats=on,pri=on", "pri=on needs ats=on,scalable=on"),
        ("vtd,scalable=on,pasid-bits=21", "`21` is not 0 to 20"),
        ("vtd,scalable=off,stage=second", "stage needs scalable=on"),
        ("vtd,scalable=on,stage=third", "`third` is not first, second or both"),
    ] {
        let message = error::<IommuOption>(text);
        assert!(message.contains(part), "{text}: {message}");
    }
}

#[test]
fn device_keys() {
    let edu = |pasid, ats, pri| {
        let kind = DeviceKind::Edu { pasid, ats, pri };
        DeviceOption { id: None, addr: None, port: None, bus: None, kind }
    };
    assert_eq!("edu".parse(), Ok(edu(false, false, false)));
    assert_eq!("edu,pasid=on".parse(), Ok(edu(true, false, false)));
    assert_eq!("edu,ats=on".parse(), Ok(edu(false, true, false)));
    assert_eq!("edu,pri=on,ats=on,pasid=on".parse(), Ok(edu(true, true, true)));
    let pinblk = |text: &str| text.parse::<DeviceOption>().unwrap().kind;
    assert_eq!(pinblk("pinblk"), DeviceKind::PinBlk { file: None, direct: false });
    assert_eq!(pinblk("pinblk,file=/x,addr=03.0"), DeviceKind::PinBlk { file: Some("/x".into()), direct: false });
    assert_eq!(pinblk("pinblk,file=/x,direct=on"), DeviceKind::PinBlk { file: Some("/x".into()), direct: true });

    let virtio = |text: &str| match text.parse::<DeviceOption>().unwrap().kind {
        DeviceKind::Virtio(kind) => kind,
        kind => panic!("{kind:?}"),
    };
    assert_eq!(virtio("virtio-rng,addr=03.0"), VirtioKind::Rng);
    assert_eq!(virtio("virtio-console,id=c"), VirtioKind::Console);
    let tap = |mac| VirtioKind::Net { tap: "tap0".into(), mac };
    assert_eq!(virtio("virtio-net,tap=tap0"), tap(None));
    assert_eq!(virtio("virtio-net,mac=52:54:00:AB:cd:09,tap=tap0"), tap(Some([0x52, 0x54, 0, 0xab, 0xcd, 9])));
    let disk = |read_only| VirtioKind::Blk { file: "/x".into(), read_only };
    assert_eq!(virtio("virtio-blk,file=/x"), disk(false));
    assert_eq!(virtio("virtio-blk,readonly=on,file=/x,id=a"), disk(true));
    let host = Bdf { domain: 0, bus: 0, device: 9, function: 0 };
    assert_eq!(
        "vfio,host=00:09.0,addr=1E.7,backend=type1,id=disk".parse(),
        Ok(DeviceOption {
            id: Some("disk".into()),
            addr: Some(RootSlot::first(Slot { device: 0x1e, function: 7 })),
            port: None,
            bus: None,
            kind: DeviceKind::Vfio { host, backend: Some(Backend::Type1) }
        })
    );
    let backend = |text: &str| match text.parse::<DeviceOption>().unwrap().kind {
        DeviceKind::Vfio { backend, .. } => backend,
        _ => None,
    };
    for key in ["", ",backend=auto"] {
        assert_eq!(backend(&format!("vfio,host=00:09.0{key}")), None);
    }
    assert_eq!(backend("vfio,host=00:09.0,backend=iommufd"), Some(Backend::Iommufd));
    let user = |text: &str| text.parse::<DeviceOption>().unwrap().kind;
    let process = |socket, confine| DeviceKind::VfioUser { socket, confine };
    assert_eq!(user("vfio-user,socket=/run/x"), process(UserSocket::Path("/run/x".into()), false));
    assert_eq!(user("vfio-user,fd=5,addr=03.0,confine=off"), process(UserSocket::Fd(5), false));
    assert_eq!(user("vfio-user,confine=on,fd=5"), process(UserSocket::Fd(5), true));
    for (text, part) in [
        ("vfio-user,fd=5,confine=yes", "`on` or `off` is expected"),
        ("vfio,host=00:09.0,confine=on", "unknown key `confine`"),
        ("vfio", "host=BDF is missing"),
        ("vfio,host=09.0", "not a PCI address"),
        ("vfio,host=00:20.0", "not a PCI address"),
        ("vfio,host=00:09.8", "not a PCI address"),
        ("vfio,host=0:0:0:0.0", "not a PCI address"),
        ("vfio,host=+0:09.0", "not a PCI address"),
        ("vfio,host=00:09.0,backend=foo", "not auto, type1 or iommufd"),
        ("vfio,host=00:09.0,speed=1", "the keys are addr, backend, bus, host, id"),
        ("vfio,host=00:09.0,host=00:09.0", "given twice"),
        ("vfio-user", "socket=PATH (or fd=N) is missing"),
        ("vfio-user,socket=", "a path is expected"),
        ("vfio-user,socket=x,fd=3", "exclude each other"),
        ("vfio-user,fd=2", "standard descriptors"),
        ("vfio-user,host=00:09.0", "the keys are addr, bus, confine, fd, id, socket"),
        ("edu,addr=00.0", "host bridge"),
        ("edu,addr=1f.0", "kept"),
        ("edu,addr=5", "not a slot"),
        ("edu,port=0", "not the number of a root port"),
        ("edu,port=16", "not the number of a root port (1 to 15)"),
        ("edu,port=1,addr=05.0", "port= excludes addr= and bus="),
        ("edu,port=1,bus=b", "port= excludes addr= and bus="),
        ("edu,pasid=on,bus=b", "bus= excludes pasid=on and ats=on"),
        ("edu,ats=on,bus=b", "bus= excludes pasid=on and ats=on"),
        ("pcie-pci-bridge,bus=b", "the keys are addr, id, port"),
        ("edu,id=", "not a name"),
        ("edu,id=a b", "not a name"),
        ("edu,host=00:09.0", "the keys are addr, ats, bus, id"),
        ("pinblk,host=00:09.0", "the keys are addr, bus, direct, file, id"),
        ("pinblk,direct=on", "direct=on needs file=PATH"),
        ("pinblk,file=", "a path is expected"),
        ("virtio-blk", "file=PATH is missing"),
        ("virtio-blk,file=", "a path is expected"),
        ("virtio-blk,file=x,readonly=1", "`on` or `off` is expected"),
        ("virtio-blk,file=x,ro=on", "the keys are addr, bus, file, id, readonly"),
        ("virtio-net", "tap=NAME is missing"),
        ("virtio-net,tap=", "not the name of an interface"),
        ("virtio-net,tap=a/b", "not the name of an interface"),
        ("virtio-net,tap=0123456789abcdef", "not the name of an interface"),
        ("virtio-net,tap=..", "not the name of an interface"),
        ("virtio-net,tap=a,mac=02:00:00:00:00", "not the address of an interface"),
        ("virtio-net,tap=a,mac=01:00:00:00:00:01", "not the address of an interface"),
        ("virtio-net,tap=a,mac=00:00:00:00:00:00", "not the address of an interface"),
        ("virtio-net,tap=a,mac=2:0:0:0:0:1", "not the address of an interface"),
        ("virtio-net,file=x", "the keys are addr, bus, id, mac, tap"),
        ("virtio-console,file=x", "the keys are addr, bus, id"),
        ("virtio-rng,file=x", "the keys are addr, bus, id"),
        (
            "floppy",
            "it is vfio, vfio-user, virtio-blk, virtio-net, virtio-rng, virtio-console, edu, pinblk or pcie-pci-bridge",
        ),
    ] {
        let message = error::<DeviceOption>(text);
        assert!(message.contains(part), "{text}: {message}");
    }
}

#[test]
fn ids_are_given_in_order_around_those_that_are_taken() {
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<DeviceOption>>();
    let devices = parse(&["edu", "vfio,host=00:09.0", "edu,id=edu0", "edu", "vfio,host=00:0a.0"]);
    assert_eq!(name_devices(&devices).unwrap(), ["edu1", "vfio0", "edu0", "edu2", "vfio1"]);
    let twice = name_devices(&parse(&["edu,id=a", "edu,id=a"])).unwrap_err();
    assert!(twice.to_string().contains("id=a"));
    let same = name_devices(&parse(&["vfio,host=00:09.0", "vfio,host=0000:00:09.0"])).unwrap_err();
    assert!(same.to_string().contains("two devices"));
    let same = name_devices(&parse(&["vfio-user,socket=/x", "vfio-user,socket=/x"])).unwrap_err();
    assert!(same.to_string().contains("socket=/x is given to two devices"));
}

#[test]
fn slots_are_given_from_01_around_those_that_are_taken() {
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<DeviceOption>>();
    let placed_beside = |ports, texts: &[&str]| {
        let of = |place: &Place| match place {
            Place::Root(slot) => slot.to_string(),
            Place::Port(port) => format!("port {port}"),
            Place::Bridge { bridge, slot } => format!("bridge {bridge} {slot}"),
        };
        place_devices(&parse(texts), ports).map(|places| places.iter().map(of).collect::<Vec<_>>())
    };
    let placed = |texts: &[&str]| placed_beside(0, texts);
    // Whatever the order, what was asked for is given.
    assert_eq!(placed(&["edu", "edu,addr=01.0", "edu"]).unwrap(), ["02.0", "01.0", "03.0"]);
    assert_eq!(placed(&["edu,addr=02.1", "edu,addr=02.0", "edu", "edu"]).unwrap(), ["02.1", "02.0", "01.0", "03.0"]);
    assert_eq!(placed(&["edu"; 30]).unwrap()[29], "1e.0");
    // Beside root ports, which are from 10 on.
    assert_eq!(placed_beside(2, &["edu,port=2", "edu", "edu,port=1"]).unwrap(), ["port 2", "01.0", "port 1"]);
    assert_eq!(placed_beside(15, &["edu"; 15]).unwrap()[14], "0f.0");
    for (ports, texts, part) in [
        (1, &["edu,port=2"][..], "port=2: there are 1 root ports; use --root-ports 2"),
        (2, &["edu,port=2", "edu,port=2"], "port=2 is given to two devices"),
        (1, &["edu,addr=10.0"], "addr=10.0 is a root port's; use a slot below 10.0"),
        (15, &["edu"; 16], "no free slot"),
    ] {
        let message = placed_beside(ports, texts).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    // Behind bridges, each with a bus of its own; the bridge may be named after what is behind it.
    let bridged =
        ["edu,bus=b", "edu", "pcie-pci-bridge,id=b", "edu,bus=b,addr=01.0", "edu,bus=c", "edu,bus=b,addr=11.0"];
    let bridged = [&bridged[..], &["pcie-pci-bridge,id=c,port=2"]].concat();
    let expected = ["bridge 2 02.0", "01.0", "02.0", "bridge 2 01.0", "bridge 6 01.0", "bridge 2 11.0", "port 2"];
    assert_eq!(placed_beside(2, &bridged).unwrap(), expected);
    let devices = parse(&bridged);
    let numbers = BusNumbers::new(2, &devices, &place_devices(&devices, 2).unwrap());
    assert_eq!((numbers.ports, numbers.last), (vec![1, 2], 4));
    assert_eq!(numbers.bridges.into_iter().collect::<Vec<_>>(), [(2, 4), (6, 3)]);
    assert_eq!(placed_beside(1, &["edu,addr=11.0"]).unwrap(), ["11.0"], "there is no second port");
    for (texts, part) in [
        (&["edu,addr=05.0", "edu,addr=5.0"][..], "addr=05.0 is given to two devices"),
        (&["edu,addr=05.0", "edu,addr=06.1", "edu"], "addr=06.1 needs a device with addr=06.0 too"),
        (&["edu"; 31], "no free slot"),
        (&["edu,bus=b", "edu,id=b"], "bus=b: there is no pcie-pci-bridge with id=b"),
        (&["edu,bus=b,addr=02.0", "edu,bus=b,addr=02.0", "pcie-pci-bridge,id=b"], "addr=02.0 is given to two devices"),
    ] {
        let message = placed(texts).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a13_a_device_may_be_in_another_segment() {
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<DeviceOption>>();
    let placed = |texts: &[&str]| {
        let shown = |place: &Place| match place {
            Place::Root(at) => at.to_string(),
            other => format!("{other:?}"),
        };
        let devices = parse(texts);
        place_devices(&devices, 1).map(|places| (places.iter().map(shown).collect::<Vec<_>>(), segments(&places)))
    };
    // The same slot in each; what has no addr= is in segment 0, which may be named, too.
    let texts = ["edu,addr=0001:00:02.0", "edu,addr=02.0", "edu,addr=0007:00:10.0", "edu", "edu,addr=0000:00:03.0"];
    let (places, numbers) = placed(&texts).unwrap();
    assert_eq!(places, ["0001:00:02.0", "02.0", "0007:00:10.0", "01.0", "03.0"]);
    assert_eq!(numbers.into_iter().collect::<Vec<_>>(), [0, 1, 7]);
    for (texts, part) in [
        (&["edu,addr=0001:00:02.0", "edu,addr=0001:00:2.0"][..], "addr=0001:00:02.0 is given to two devices"),
        (&["edu,addr=0001:00:02.1", "edu,addr=02.0"], "addr=0001:00:02.1 needs a device with addr=0001:00:02.0 too"),
        (&["edu,addr=0000:00:10.0"], "addr=10.0 is a root port's"),
    ] {
        let message = placed(texts).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    for (text, part) in [
        ("edu,addr=0008:00:02.0", "segments are 0 to 7"),
        ("edu,addr=0001:01:02.0", "there is bus 00 only"),
        ("edu,addr=1:00:02.0", "is not a slot"),
        ("edu,addr=00:02.0", "is not a slot"),
        ("edu,addr=0001:00:00.0", "slot 00 is the host bridge's"),
        ("edu,addr=0001:00:1f.0", "slot 1f is kept"),
        ("edu,bus=b,addr=0001:00:02.0", "bridges are in segment 0"),
        ("pcie-pci-bridge,addr=0001:00:02.0", "a slot of segment 0"),
    ] {
        let message = error::<DeviceOption>(text);
        assert!(message.contains(part), "{text}: {message}");
    }
}

#[test]
fn time_limits() {
    assert_eq!(seconds("1.5").unwrap(), std::time::Duration::from_millis(1500));
    assert_eq!(seconds("0.001").unwrap(), std::time::Duration::from_millis(1));
    for text in ["0", "-1", "nan", "inf", "x", "", "1e-10", "0.0009", "1e19", "1000000001"] {
        assert!(seconds(text).is_err(), "{text}");
    }
}
