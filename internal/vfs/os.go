package vfs

import (
	"errors"
	"io"
	iofs "io/fs"
	"os"
	"path"
	"sort"
	"unsafe"

	"golang.org/x/sys/unix"

	"firn.io/firn/internal/block"
)

// OS is the machine's file system.
type OS struct {
	counters [NumClasses]counters
}

// NewOS returns the machine's file system with counters at zero.
func NewOS() *OS { return &OS{} }

// kindOf translates an operating system's error.
func kindOf(err error) block.Kind {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return block.NoSpace
	case errors.Is(err, iofs.ErrNotExist):
		return block.NotFound
	case errors.Is(err, iofs.ErrExist):
		return block.Exists
	case errors.Is(err, iofs.ErrPermission):
		return block.Denied
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EBUSY):
		return block.Busy
	}
	return block.Internal
}

// fail wraps an error of the system. The causes of package os name the path
// and the call already.
func fail(err error, doing, name string) error {
	var pe *iofs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return block.Wrap(kindOf(err), err, "%s %s", doing, name)
}

// Open implements FS.
func (s *OS) Open(name string, f Flags, c Class) (File, error) {
	mode := os.O_RDWR
	if f&ReadOnly != 0 {
		mode = os.O_RDONLY
	}
	if f&Create != 0 {
		mode |= os.O_CREATE
	}
	if f&Exclusive != 0 {
		mode |= os.O_EXCL
	}
	if f&Truncate != 0 {
		mode |= os.O_TRUNC
	}
	if f&Direct != 0 {
		file, err := os.OpenFile(name, mode|unix.O_DIRECT, 0o644)
		if err == nil {
			return &osFile{File: file, direct: true, n: &s.counters[c]}, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return nil, fail(err, "open", name)
		}
		// The failed call may have made the file.
		mode &^= os.O_EXCL
	}
	file, err := os.OpenFile(name, mode, 0o644)
	if err != nil {
		return nil, fail(err, "open", name)
	}
	return &osFile{File: file, n: &s.counters[c]}, nil
}

// Remove implements FS.
func (s *OS) Remove(name string) error {
	if err := os.Remove(name); err != nil {
		return fail(err, "remove", name)
	}
	return nil
}

// RemoveAll implements FS.
func (s *OS) RemoveAll(name string) error {
	if err := os.RemoveAll(name); err != nil {
		return fail(err, "remove", name)
	}
	return nil
}

// Rename implements FS.
func (s *OS) Rename(from, to string) error {
	err := os.Rename(from, to)
	var le *os.LinkError
	if errors.As(err, &le) {
		return block.Wrap(kindOf(le.Err), le.Err, "rename %s to %s", from, to)
	}
	return err
}

// List implements FS.
func (s *OS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fail(err, "list", dir)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	sort.Strings(names)
	return names, nil
}

// MkdirAll implements FS.
func (s *OS) MkdirAll(dir string) error {
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	parent := path.Dir(path.Clean(dir))
	if parent != dir {
		if err := s.MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, iofs.ErrExist) {
		return fail(err, "make folder", dir)
	}
	return s.SyncDir(parent)
}

// SyncDir implements FS.
func (s *OS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fail(err, "open folder", dir)
	}
	s.counters[ClassOther].syncs.Add(1)
	err = d.Sync()
	d.Close()
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: the file system has nothing to sync
		return syncError(err, dir)
	}
	return nil
}

// Stat implements FS.
func (s *OS) Stat(name string) (Info, error) {
	i, err := os.Stat(name)
	if err != nil {
		return Info{}, fail(err, "stat", name)
	}
	info := Info{Name: i.Name(), IsDir: i.IsDir()}
	if !info.IsDir {
		info.Size = i.Size()
	}
	return info, nil
}

// Lock implements FS with flock, so that the lock ends with the process and
// also two holders in one process exclude each other.
func (s *OS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fail(err, "open lock", name)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fail(err, "lock", name)
	}
	return f, nil
}

// Space implements FS.
func (s *OS) Space(dir string) (Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Space{}, fail(err, "ask the size of the file system of", dir)
	}
	return Space{TotalBytes: int64(st.Blocks) * st.Bsize, FreeBytes: int64(st.Bavail) * st.Bsize}, nil
}

// Counts implements FS.
func (s *OS) Counts(c Class) Counts { return s.counters[c].counts() }

type osFile struct {
	*os.File
	direct bool
	n      *counters
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	f.n.read(n)
	if err != nil && err != io.EOF {
		err = fail(err, "read", f.Name())
	}
	return n, err
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	f.n.wrote(n)
	if err != nil {
		err = fail(err, "write", f.Name())
	}
	return n, err
}

// maxVector is the kernel's IOV_MAX.
const maxVector = 1024

func (f *osFile) WriteAtv(bufs [][]byte, off int64) (int, error) {
	done := 0
	fd := int(f.Fd())
	for len(bufs) > 0 {
		n, err := pwritev(fd, bufs[:min(len(bufs), maxVector)], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		f.n.wrote(n)
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return done, fail(err, "write", f.Name())
		}
		done += n
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 {
			// A short write inside a buffer: the rest of that buffer by itself,
			// so that the caller's list stays as it was.
			m, err := f.WriteAt(bufs[0][n:], off+int64(done))
			done += m
			if err != nil {
				return done, err
			}
			bufs = bufs[1:]
		}
	}
	return done, nil
}

func pwritev(fd int, bufs [][]byte, off int64) (int, error) {
	var fixed [64]unix.Iovec
	iovs := fixed[:0]
	if len(bufs) > len(fixed) {
		iovs = make([]unix.Iovec, 0, len(bufs))
	}
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		v := unix.Iovec{Base: &b[0]}
		v.SetLen(len(b))
		iovs = append(iovs, v)
	}
	if len(iovs) == 0 {
		return 0, nil
	}
	n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)),
		uintptr(off), uintptr(uint64(off)>>32), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (f *osFile) Sync() error {
	f.n.syncs.Add(1)
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return syncError(err, f.Name())
		}
		return nil
	}
}

func (f *osFile) Allocate(off, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, off, n)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EOPNOTSUPP:
			size, err := f.Size()
			if err == nil && size < off+n {
				err = f.Truncate(off + n)
			}
			return err
		case err != nil:
			return fail(err, "allocate", f.Name())
		}
		return nil
	}
}

func (f *osFile) Truncate(size int64) error {
	if err := f.File.Truncate(size); err != nil {
		return fail(err, "truncate", f.Name())
	}
	return nil
}

func (f *osFile) Size() (int64, error) {
	i, err := f.Stat()
	if err != nil {
		return 0, fail(err, "stat", f.Name())
	}
	return i.Size(), nil
}

func (f *osFile) Direct() bool { return f.direct }

func (f *osFile) DropCache() error {
	if f.direct {
		return nil
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fail(err, "drop the cache of", f.Name())
	}
	return nil
}
