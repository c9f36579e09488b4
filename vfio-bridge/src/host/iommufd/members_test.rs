use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::*;

/// What was asked of all members, in its order: which, and the page table (0: detach).
type Log = Rc<RefCell<Vec<(u32, u32)>>>;

/// What one of them refuses.
type Refuses = Rc<Cell<Option<u32>>>;

struct Fake {
    number: u32,
    log: Log,
    refuses: Refuses,
}

impl Fake {
    fn asked(&self, to: u32) -> io::Result<()> {
        if self.refuses.get() == Some(to) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.log.borrow_mut().push((self.number, to));
        Ok(())
    }
}

impl Member for Fake {
    fn attach(&self, to: Hwpt) -> io::Result<()> {
        self.asked(to.0)
    }
    fn detach(&self) -> io::Result<()> {
        self.asked(0)
    }
}

/// Three functions; what was asked of them; what each refuses.
fn group() -> (Members<Fake>, Log, Vec<Refuses>) {
    let log = Log::default();
    let refuses: Vec<Refuses> = (0..3).map(|_| Rc::default()).collect();
    let mut members = Members::default();
    for (number, refuses) in (1..).zip(&refuses) {
        members.add(Fake { number, log: log.clone(), refuses: refuses.clone() }).expect("added");
    }
    (members, log, refuses)
}

fn attach(members: &mut Members<Fake>, to: u32) -> Result<(), Failed> {
    members.attach(|member| member.attach(Hwpt(to)).map(|()| Hwpt(to)))
}

#[test]
fn c1_each_function_of_a_group_is_attached_and_detached() {
    let (mut members, log, _) = group();
    attach(&mut members, 7).expect("attached");
    members.detach().expect("detached");
    assert_eq!(log.take(), [(1, 7), (2, 7), (3, 7), (1, 0), (2, 0), (3, 0)]);
}

#[test]
fn c2_a_group_of_which_one_function_cannot_follow_is_where_it_was() {
    let (mut members, log, refuses) = group();
    // From nowhere.
    refuses[2].set(Some(7));
    assert!(matches!(attach(&mut members, 7), Err(Failed::Undone(e)) if e.raw_os_error() == Some(libc::EINVAL)));
    assert_eq!(log.take(), [(1, 7), (2, 7), (2, 0), (1, 0)]);
    // From a page table.
    attach(&mut members, 5).expect("attached");
    log.take();
    assert!(matches!(attach(&mut members, 7), Err(Failed::Undone(_))));
    assert_eq!(log.take(), [(1, 7), (2, 7), (2, 5), (1, 5)]);
    // Who comes later goes where they are.
    let refuses = Refuses::default();
    members.add(Fake { number: 4, log: log.clone(), refuses }).expect("added");
    assert_eq!(log.take(), [(4, 5)]);
}

#[test]
fn c2_a_group_that_cannot_go_back_reaches_nothing_or_is_said_to_be_astray() {
    let (mut members, log, refuses) = group();
    attach(&mut members, 5).expect("attached");
    log.take();
    refuses[2].set(Some(7));
    // The first goes to 7 and will not go back to 5.
    refuses[0].set(Some(5));
    assert!(matches!(attach(&mut members, 7), Err(Failed::Undone(_))));
    assert_eq!(log.take(), [(1, 7), (2, 7), (2, 5), (1, 0), (2, 0), (3, 0)]);
    refuses[0].set(None);
    attach(&mut members, 5).expect("attached");
    // The first goes to 7 and will not go back; the second will not be detached.
    let astray = members.attach(|member| match member.number {
        1 => member.attach(Hwpt(7)).map(|()| Hwpt(7)),
        _ => {
            refuses[0].set(Some(5));
            refuses[1].set(Some(0));
            Err(io::ErrorKind::InvalidInput.into())
        }
    });
    assert!(matches!(astray, Err(Failed::Astray(_))), "{astray:?}");
}
