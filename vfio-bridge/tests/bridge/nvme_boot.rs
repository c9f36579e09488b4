//! What a unit told its bridge, and where guest RAM was: lines of `causeway run --trace FILE --memory 512M --device
//! vfio,host=NVME --device vfio,host=EDU` in the nested bench (Linux 6.12.95, `intel_iommu=on`), of a guest that boots,
//! reads 2 MiB of its NVMe and powers off: `grep -E ' notify | host memory ' FILE | cut -d' ' -f2-`, without the
//! address of the memory.

pub const TRACE: &str = "\
host memory gpa=0x0-0x1fffffff
notify attach device=0000:00:01.0 space=identity
notify attached device=0000:00:01.0 space=identity result=ok
notify attach device=0000:00:02.0 space=identity
notify attached device=0000:00:02.0 space=identity result=ok
notify attach device=0000:00:01.0 space=unit0/domain3/root0x4bbd000/48bit
notify attached device=0000:00:01.0 space=unit0/domain3/root0x4bbd000/48bit result=ok
notify attach device=0000:00:02.0 space=unit0/domain4/root0x4bc0000/48bit
notify attached device=0000:00:02.0 space=unit0/domain4/root0x4bc0000/48bit result=ok
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffff000-0xffffffff gpa=0x1fd2a000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffe000-0xffffefff gpa=0x1fd2e000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff gpa=0x59f2000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff gpa=0x59f7000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff gpa=0x1fe60000 perm=r
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff gpa=0x1e5ac000 perm=r
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff gpa=0x1e5ac000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffd000-0xffffdfff gpa=0x1fe61000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffffc000-0xffffcfff gpa=0x1fe62000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xffff8000-0xffffbfff gpa=0x1fe64000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffe0000-0xfffe7fff gpa=0x1fe68000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffe8000-0xfffeffff gpa=0x1fd30000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x59f2000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1fe27000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1fe25000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1fe25000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1fe25000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1fe23000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1febe000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1febf000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x1feb9000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff gpa=0x59eb000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffdf000-0xfffdffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffa0fff gpa=0x1fcb0000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa1000-0xfffa1fff gpa=0x1fd01000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa2000-0xfffa2fff gpa=0x1fe79000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa3000-0xfffa4fff gpa=0x1fe9a000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa5000-0xfffa6fff gpa=0x1fd1a000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa7000-0xfffaafff gpa=0x1fca0000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffab000-0xfffaefff gpa=0x1fe28000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffaf000-0xfffb2fff gpa=0x1fd1c000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffb3000-0xfffbdfff gpa=0x1f640000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=9 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbdfff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff gpa=0x1f64b000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff94fff gpa=0x1f66b000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff95000-0xfff9ffff gpa=0x5980000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff gpa=0x598b000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff94fff gpa=0x59ab000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff95000-0xfff9ffff gpa=0x5640000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff gpa=0x564b000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffb4fff gpa=0x566b000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffb5000-0xfffbffff gpa=0x1f0c0000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff gpa=0x1f0cb000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff94fff gpa=0x1f0eb000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff95000-0xfff9ffff gpa=0x1fcc0000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff gpa=0x1fccb000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff94fff gpa=0x1fceb000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff95000-0xfff9ffff gpa=0x1fd80000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff gpa=0x1fd8b000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff gpa=0x1fdab000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff gpa=0x1fdcb000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffb4fff gpa=0x1fdeb000 perm=rw
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffb5000-0xfffbffff gpa=0x1fc00000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=2 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff gpa=0x1fc0b000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify map space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff gpa=0x1fc2b000 perm=rw
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfff80000-0xfff9ffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify unmap space=unit0/domain3/root0x4bbd000/48bit iova=0xfffa0000-0xfffbffff
notify applied space=unit0/domain3/root0x4bbd000/48bit ops=1 refused=0
notify attach device=0000:00:01.0 space=identity
notify attached device=0000:00:01.0 space=identity result=ok
notify attach device=0000:00:02.0 space=identity
notify attached device=0000:00:02.0 space=identity result=ok
";
