//! How the iommufd of this host is opened, and functions that are bound to it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};
use log::debug;
use vfio_ioctls::{VfioDevice, VfioDeviceFd, VfioError, VfioIommufd};

use super::kernel::{BoundDevice, Cdev, Host};
use super::sys::{self, Ioas};
use super::{Iommufd, Refused};
use crate::bridge::guest_map::GuestMap;
use crate::function::check::{Bdf, CheckedFunction, HostPaths, OpenError};
use crate::function::of_iommufd::OfThisIommufd;
use crate::function::vfio::HostFunction;
use crate::host::{GroupId, HostDevice};

impl Iommufd {
    /// A backend without groups, for a guest whose memory is `guest`. `kvm` is the virtual machine's KVM-VFIO device:
    /// the file of each function is added to it before the function can be used (F-7).
    pub fn new(kvm: Option<Arc<VfioDeviceFd>>, guest: &GuestMap) -> Result<Self, OpenError> {
        let node = HostPaths::default().dev_iommu;
        let file = |source: io::Error| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => OpenError::Permission(node.clone()),
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::NoIommufd(node.clone()),
            _ => OpenError::File { path: node.clone(), source },
        };
        let crate_error = |e: IommufdError| file(sys::io_error(e));
        let fd = Arc::new(IommuFd::new().map_err(crate_error)?);
        let ioas = Arc::new(IommufdIoas::new(Arc::clone(&fd)).map_err(crate_error)?);
        let of_ram = Ioas(ioas.id());
        let vfio = VfioIommufd::new(fd, Some(ioas), kvm).map_err(|e| file(io::Error::other(e)))?;
        let backend = Self::over(Host::new(vfio), of_ram, guest).map_err(file)?;
        debug!("iommufd: guest memory is {}", if backend.pins_once() { "pinned once" } else { "pinned by each space" });
        Ok(backend)
    }

    /// Opens `function` by its own device file. On an error nothing of it stays attached.
    pub fn open(&self, function: &CheckedFunction) -> Result<HostFunction, OpenError> {
        let (bdf, group) = (function.bdf(), function.group());
        if self.has(bdf) {
            return Err(OpenError::AssignedTwice(bdf));
        }
        let vfio = |reason: String| OpenError::Vfio { bdf, reason };
        let (sysfs, iommufd) = (function.path(), Arc::clone(&self.kernel.vfio));
        let device = Arc::new(VfioDevice::new(sysfs, iommufd, false).map_err(|e| explain(function, e))?);
        let number = device.iommufd_dev_id().ok_or_else(|| vfio("it is not bound to the iommufd".to_owned()))?;
        let number = HostDevice(number);
        let host_function = HostFunction::new(Arc::clone(&device), function, Arc::new(OfThisIommufd));
        let host_function = host_function.map_err(|e| explain(function, e))?;
        self.kernel.bound(number, Box::new(Cdev(device)));
        match self.add(group, bdf, number) {
            Ok(()) => Ok(host_function),
            Err(refused) => {
                self.kernel.forget(number);
                Err(match refused {
                    Refused::Twice => OpenError::AssignedTwice(bdf),
                    Refused::Limits(e) => vfio(format!("what its IOMMU allows could not be read: {e}")),
                    Refused::Group(e) => vfio(format!("it could not follow its group: {e}")),
                })
            }
        }
    }
}

impl Iommufd {
    /// `function`, which is behind the bridge no longer, is closed, or about to be: nothing here keeps its file.
    pub fn close(&self, function: Bdf) {
        if let Some(number) = self.take(function) {
            self.kernel.forget(number);
        }
    }

    /// Adds a device of `group` that is no function of VFIO's: one of Linux's `IOMMUFD_TEST`, for instance. `bind`
    /// gets the iommufd, binds the device to it, attached to nothing, and gives back the number that the kernel has
    /// for it.
    ///
    /// # Errors
    /// That of `bind`; or what its IOMMU allows could not be read, or it could not be attached to where its group is.
    /// Then it stays bound, and is no member.
    pub fn add_device(
        &self,
        group: GroupId,
        bind: impl FnOnce(BorrowedFd<'_>) -> io::Result<(HostDevice, Box<dyn BoundDevice>)>,
    ) -> io::Result<HostDevice> {
        // SAFETY: the iommufd is open for as long as `self.kernel` is there.
        let fd = unsafe { BorrowedFd::borrow_raw(self.kernel.vfio.iommufd().as_raw_fd()) };
        let (number, device) = bind(fd)?;
        self.kernel.bound(number, device);
        self.add(group, None::<Bdf>, number).map_err(|refused| {
            self.kernel.forget(number);
            match refused {
                Refused::Twice => io::ErrorKind::AlreadyExists.into(),
                Refused::Limits(e) | Refused::Group(e) => e,
            }
        })?;
        Ok(number)
    }
}

/// What a refusal of VFIO means to the user.
fn explain(function: &CheckedFunction, error: VfioError) -> OpenError {
    let (bdf, group) = (function.bdf(), function.group());
    let node = HostPaths::default().device_file(bdf).unwrap_or_else(|_| function.path().to_owned());
    let errno = match &error {
        VfioError::OpenDeviceCdev(e) => e.raw_os_error(),
        VfioError::VfioDeviceBindIommufd(e) => Some(e.errno()),
        _ => None,
    };
    match (error, errno) {
        (_, Some(libc::EBUSY)) => OpenError::DeviceBusy { bdf, group },
        (VfioError::VfioDeviceBindIommufd(_), Some(libc::EPERM)) => OpenError::UnsafeInterruptsOfIommufd(bdf),
        (VfioError::OpenDeviceCdev(_), Some(libc::EACCES | libc::EPERM)) => OpenError::Permission(node),
        (VfioError::OpenDeviceCdev(source), _) => OpenError::File { path: node, source },
        (VfioError::InvalidVfioDev, _) => OpenError::NoDeviceFiles(bdf),
        (other, _) => OpenError::Vfio { bdf, reason: other.to_string() },
    }
}
