//! The limit on open files: each vector that a guest uses is one.

use std::io;

use vtd::Requester;

/// What is opened after the machine was made: the event loop and what it watches, statistics, a look at how a function
/// is reset.
const SPARE: usize = 16;

/// Raises the limit to what this process may raise it to. Programs that wait by `select` keep it low; this is none.
///
/// # Errors
/// The system did not allow it, which leaves it as it was.
pub fn raise_limit() -> io::Result<()> {
    let mut limit = get()?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the structure is what the call reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn get() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is what the call writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

/// Files that this process can have open at a time.
fn limit() -> usize {
    get().map_or(usize::MAX, |limit| usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

/// Adds to an error what helps, if the limit is its cause.
pub fn remedy(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            let message = format!("{error}, {} of them; raise the limit with: ulimit -n NUMBER", limit());
            io::Error::new(error.kind(), message)
        }
        _ => error,
    }
}

/// How many files vectors may be, with all else open that the machine needs.
pub fn room_for_vectors() -> io::Result<usize> {
    // The folder's own file is among them.
    let open = std::fs::read_dir("/proc/self/fd").map_err(remedy)?.count().saturating_sub(1);
    Ok(limit().saturating_sub(open + SPARE))
}

/// Says what of `wanted` vectors there is no room for.
pub fn report(wanted: usize, room: usize) {
    if wanted > room {
        let limit = limit();
        log::warn!(
            "the assigned functions have {wanted} interrupt vectors, each an open file while the guest uses it, and the limit of {limit} \
             open files leaves room for {room}; for all of them raise it with: ulimit -n {}",
            limit.saturating_add(wanted - room)
        );
    }
}

/// Deals `room` out: whoever wants no more than an equal share gets what it wants, and what it leaves goes to the
/// others. So no function is in another's way, however many vectors that has.
pub fn shares(wants: &[(Requester, usize)], room: usize) -> Vec<(Requester, usize)> {
    let mut ascending = wants.to_vec();
    ascending.sort_by_key(|(_, wanted)| *wanted);
    let (mut left, mut takers) = (room, ascending.len());
    for (_, share) in &mut ascending {
        *share = (*share).min(left / takers);
        left -= *share;
        takers -= 1;
    }
    ascending
}

#[cfg(test)]
mod tests {
    use super::*;
    use vtd::SourceId;

    fn shares_of(wants: &[usize], room: usize) -> Vec<usize> {
        let requester = |device: usize| Requester { segment: 0, sid: SourceId::new(0, device as u8, 0) };
        let wants: Vec<_> = wants.iter().enumerate().map(|(i, wanted)| (requester(i), *wanted)).collect();
        let shares: Vec<(Requester, usize)> = shares(&wants, room);
        wants.iter().map(|(of, _)| shares.iter().find(|(requester, _)| requester == of).unwrap().1).collect()
    }

    #[test]
    fn f5_no_function_is_in_anothers_way_however_many_vectors_it_has() {
        assert_eq!(shares_of(&[65, 2049, 65], 10_000), [65, 2049, 65], "there is enough");
        assert_eq!(shares_of(&[2049, 65, 1], 900), [834, 65, 1]);
        assert_eq!(shares_of(&[2049, 2049, 5], 4000), [1997, 1998, 5]);
        assert_eq!(shares_of(&[10, 10, 10], 8), [2, 3, 3]);
        assert_eq!(shares_of(&[10], 0), [0]);
        assert!(shares_of(&[], 10).is_empty());
    }

    #[test]
    fn the_limit_is_raised_and_what_is_open_leaves_room_for_the_rest() {
        raise_limit().unwrap();
        let limits = get().unwrap();
        assert_eq!(limits.rlim_cur, limits.rlim_max);
        let room = room_for_vectors().unwrap();
        assert!(room < limit(), "{room}");
    }

    #[test]
    fn a_limit_that_is_reached_is_named_with_what_helps() {
        let said = remedy(io::Error::from_raw_os_error(libc::EMFILE)).to_string();
        assert!(said.contains(&limit().to_string()) && said.contains("ulimit -n"), "{said}");
        assert!(!remedy(io::Error::from_raw_os_error(libc::EIO)).to_string().contains("ulimit"));
    }
}
