//! Sockets whose file is there only when somebody listens: who waits for the file can connect.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// How many other names are tried: one that is taken was left by a process that was killed in this very moment.
const TRIES: u32 = 16;

/// A file that goes when this is dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.0) {
            log::warn!("{} could not be removed: {e}", self.0.display());
        }
    }
}

/// Listens at `path`. The socket is made under another name in the same folder, and gets this one when it takes
/// connections.
///
/// # Errors
/// `AddrInUse` where there is something at `path`, whatever it is; those of a bind. Nothing is left then.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    // A longer one could be made, and nobody could connect to it.
    SocketAddr::from_pathname(path)?;
    let (Some(_), Some(folder)) = (path.file_name(), path.parent()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let folder = File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?;
    let (listener, made) = bind_in(&folder)?;
    // As a bind, it takes the place of nothing.
    fs::hard_link(&made.0, path).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => ErrorKind::AddrInUse.into(),
        _ => e,
    })?;
    Ok(listener)
}

/// Listens in this folder, which stays open as long as what is given back is used.
fn bind_in(folder: &File) -> io::Result<(UnixListener, Temporary)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut tries = 0;
    loop {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // By the descriptor: the other name may be longer than the one that is wanted, and an address has 107 bytes.
        let path = format!("/proc/self/fd/{}/.causeway-{}-{number}", folder.as_raw_fd(), std::process::id());
        match UnixListener::bind(&path) {
            Ok(listener) => return Ok((listener, Temporary(path.into()))),
            Err(e) if e.kind() == ErrorKind::AddrInUse && tries < TRIES => tries += 1,
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicBool;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn who_waits_for_the_file_of_a_socket_is_never_refused() {
        let folder = TempDir::new().unwrap();
        let (path, ends) = (folder.as_path().join("socket"), AtomicBool::new(false));
        let (listeners, refused) = std::thread::scope(|scope| {
            let clients = [(); 2].map(|()| {
                scope.spawn(|| {
                    let mut refused = 0;
                    while !ends.load(Ordering::Relaxed) {
                        if let Err(e) = UnixStream::connect(&path) {
                            refused += u32::from(e.kind() == ErrorKind::ConnectionRefused);
                        }
                    }
                    refused
                })
            });
            // They stay: who found the name before it went is not refused either. Nothing here panics while clients
            // go on.
            let listeners: io::Result<Vec<UnixListener>> =
                (0..400).map(|_| listen(&path).and_then(|it| fs::remove_file(&path).map(|()| it))).collect();
            ends.store(true, Ordering::Relaxed);
            (listeners, clients.map(|client| client.join().unwrap()))
        });
        // Clients seldom come between bind and listen: each must have had another name then.
        let bound = listeners.unwrap().into_iter().map(|it| it.local_addr().unwrap());
        assert!(bound.into_iter().all(|bound| bound.as_pathname() != Some(path.as_path())));
        assert_eq!(refused, [0, 0]);
        assert_eq!(names(folder.as_path()), [""; 0]);
    }

    #[test]
    fn what_is_there_stays_and_nothing_else_is_left() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.as_path().join(name);
        fs::write(at("file"), "").unwrap();
        fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
        let _live = listen(&at("live")).unwrap();
        drop(listen(&at("stale")).unwrap());
        let before = names(folder.as_path());
        assert_eq!(before, ["file", "folder", "link", "live", "stale"]);
        for name in &before {
            assert_eq!(listen(&at(name)).unwrap_err().kind(), ErrorKind::AddrInUse, "{name}");
        }
        assert_eq!(listen(&at("none/socket")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(listen(&at(&"long".repeat(30))).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(listen(Path::new("/")).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(names(folder.as_path()), before);
        assert!(UnixStream::connect(at("live")).is_ok());
    }

    #[test]
    fn the_longest_path_of_an_address_can_be_listened_at() {
        let folder = TempDir::new().unwrap();
        let len = 107 - folder.as_path().as_os_str().len() - 1;
        let path = folder.as_path().join("n".repeat(len));
        let _listener = listen(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        assert!(listen(&folder.as_path().join("n".repeat(len + 1))).is_err());
    }
}
