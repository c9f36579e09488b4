//! a machine that moves to another host.

use super::*;

#[test]
fn a14_a_machine_of_several_vcpus_moves_over_tcp() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let (first, socket) = bench.edu();
    let mut processes = vec![first];
    // What it writes goes by message, and is known here.
    let device = format!("vfio-user,socket={},confine=on,id=other", text(&socket));
    let mut machine = bench.start(ROUNDS, &["--cpus", "3", "--device", &device]);
    machine.done(&["status"]);
    for _ in 0..2 {
        // One that nobody has.
        let place = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address = format!("tcp:{place}");
        let (process, socket) = bench.edu();
        let mut next = bench.machine(&["--incoming", &address, "--user-socket", &format!("other={}", text(&socket))]);
        // As soon as it listens.
        let start = Instant::now();
        let moved = loop {
            let (code, reply, message) = machine.ctl(&["migrate", &address, "--verify"]);
            match code {
                0 => break serde_json::from_str::<Value>(&reply).unwrap(),
                _ if message.contains("nobody is reached") && start.elapsed() < Duration::from_secs(30) => {
                    assert!(next.child.try_wait().unwrap().is_none());
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => panic!("{code}: {message}"),
            }
        };
        assert_eq!(moved["migrated"], address, "{moved}");
        assert_eq!(machine.end().status.code(), Some(0), "the source ends");
        processes.push(process);
        machine = next;
    }
    assert_eq!(result(&machine.end()), wanted(ROUNDS));
}
