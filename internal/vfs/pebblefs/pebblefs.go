// Package pebblefs lends a vfs.FS to Pebble, so that its files go through the
// same counters and can be crashed by the same simulated disk as the log's.
package pebblefs

import (
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"firn.io/firn/internal/block"
	firnvfs "firn.io/firn/internal/vfs"
)

// New returns fs as Pebble wants it. Its files count as class.
func New(fs firnvfs.FS, class firnvfs.Class) vfs.FS { return adapter{fs, class} }

type adapter struct {
	fs    firnvfs.FS
	class firnvfs.Class
}

// Create implements vfs.FS. An existing file is replaced, not emptied: whoever
// holds it open keeps its bytes.
func (a adapter) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	if err := a.fs.Remove(name); err != nil && block.KindOf(err) != block.NotFound {
		return nil, err
	}
	return a.open(name, firnvfs.Create)
}

func (a adapter) open(name string, f firnvfs.Flags) (vfs.File, error) {
	file, err := a.fs.Open(name, f, a.class)
	if err != nil {
		return nil, err
	}
	return &handle{file: file, name: name}, nil
}

// Link implements vfs.FS. Pebble links files for checkpoints and for ingestion
// from outside, which Firn does not use, and copies where it cannot link.
func (a adapter) Link(oldname, newname string) error {
	return block.Errorf(block.Unsupported, "link %s to %s", oldname, newname)
}

// Open implements vfs.FS, for reading; Pebble opens folders so as well.
func (a adapter) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	if info, err := a.fs.Stat(name); err == nil && info.IsDir {
		return a.OpenDir(name)
	}
	f, err := a.open(name, firnvfs.ReadOnly)
	if err != nil {
		return nil, err
	}
	for _, o := range opts {
		o.Apply(f)
	}
	return f, nil
}

// OpenReadWrite implements vfs.FS.
func (a adapter) OpenReadWrite(name string, _ vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := a.open(name, firnvfs.Create)
	if err != nil {
		return nil, err
	}
	for _, o := range opts {
		o.Apply(f)
	}
	return f, nil
}

// OpenDir implements vfs.FS: a folder can be synced and closed.
func (a adapter) OpenDir(name string) (vfs.File, error) {
	info, err := a.fs.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir {
		return nil, block.Errorf(block.Invalid, "open folder %s: it is a file", name)
	}
	return folder{a.fs, name}, nil
}

// Remove implements vfs.FS.
func (a adapter) Remove(name string) error { return a.fs.Remove(name) }

// RemoveAll implements vfs.FS.
func (a adapter) RemoveAll(name string) error { return a.fs.RemoveAll(name) }

// Rename implements vfs.FS.
func (a adapter) Rename(oldname, newname string) error { return a.fs.Rename(oldname, newname) }

// ReuseForWrite implements vfs.FS.
func (a adapter) ReuseForWrite(oldname, newname string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	if err := a.fs.Rename(oldname, newname); err != nil {
		return nil, err
	}
	return a.open(newname, 0)
}

// MkdirAll implements vfs.FS.
func (a adapter) MkdirAll(dir string, _ os.FileMode) error { return a.fs.MkdirAll(dir) }

// Lock implements vfs.FS.
func (a adapter) Lock(name string) (io.Closer, error) { return a.fs.Lock(name) }

// List implements vfs.FS.
func (a adapter) List(dir string) ([]string, error) { return a.fs.List(dir) }

// Stat implements vfs.FS.
func (a adapter) Stat(name string) (vfs.FileInfo, error) {
	i, err := a.fs.Stat(name)
	if err != nil {
		return nil, err
	}
	return info{i}, nil
}

// PathBase implements vfs.FS.
func (a adapter) PathBase(p string) string { return path.Base(p) }

// PathJoin implements vfs.FS.
func (a adapter) PathJoin(elem ...string) string { return path.Join(elem...) }

// PathDir implements vfs.FS.
func (a adapter) PathDir(p string) string { return path.Dir(p) }

// GetDiskUsage implements vfs.FS.
func (a adapter) GetDiskUsage(dir string) (vfs.DiskUsage, error) {
	sp, err := a.fs.Space(dir)
	if err != nil {
		return vfs.DiskUsage{}, err
	}
	return vfs.DiskUsage{AvailBytes: uint64(sp.FreeBytes), TotalBytes: uint64(sp.TotalBytes),
		UsedBytes: uint64(sp.TotalBytes - sp.FreeBytes)}, nil
}

// Unwrap implements vfs.FS.
func (a adapter) Unwrap() vfs.FS { return nil }

// handle is an open file with the positions that streams need. Pebble writes
// and reads a stream from one goroutine at a time.
type handle struct {
	file    firnvfs.File
	name    string
	readAt  int64
	writeAt int64
}

func (h *handle) Close() error { return h.file.Close() }

func (h *handle) Read(p []byte) (int, error) {
	n, err := h.file.ReadAt(p, h.readAt)
	h.readAt += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (h *handle) ReadAt(p []byte, off int64) (int, error) { return h.file.ReadAt(p, off) }

func (h *handle) Write(p []byte) (int, error) {
	n, err := h.file.WriteAt(p, h.writeAt)
	h.writeAt += int64(n)
	return n, err
}

func (h *handle) WriteAt(p []byte, off int64) (int, error) { return h.file.WriteAt(p, off) }

// Preallocate does nothing: the file's length would grow, and Pebble takes it
// for what was written.
func (h *handle) Preallocate(_, _ int64) error { return nil }

func (h *handle) Stat() (vfs.FileInfo, error) {
	n, err := h.file.Size()
	if err != nil {
		return nil, err
	}
	return info{firnvfs.Info{Name: path.Base(h.name), Size: n}}, nil
}

func (h *handle) Sync() error { return h.file.Sync() }

// SyncTo is a hint to write out early, and is not taken.
func (h *handle) SyncTo(int64) (fullSync bool, err error) { return false, nil }

func (h *handle) SyncData() error { return h.file.Sync() }

func (h *handle) Prefetch(_, _ int64) error { return nil }

func (h *handle) Fd() uintptr { return vfs.InvalidFd }

// folder is an open folder.
type folder struct {
	fs   firnvfs.FS
	name string
}

func (f folder) refuse(doing string) error {
	return block.Errorf(block.Invalid, "%s %s: it is a folder", doing, f.name)
}

func (f folder) Close() error                       { return nil }
func (f folder) Read([]byte) (int, error)           { return 0, f.refuse("read") }
func (f folder) ReadAt([]byte, int64) (int, error)  { return 0, f.refuse("read") }
func (f folder) Write([]byte) (int, error)          { return 0, f.refuse("write") }
func (f folder) WriteAt([]byte, int64) (int, error) { return 0, f.refuse("write") }
func (f folder) Preallocate(_, _ int64) error       { return f.refuse("allocate") }
func (f folder) Stat() (vfs.FileInfo, error) {
	return info{firnvfs.Info{Name: path.Base(f.name), IsDir: true}}, nil
}
func (f folder) Sync() error                             { return f.fs.SyncDir(f.name) }
func (f folder) SyncTo(int64) (fullSync bool, err error) { return false, nil }
func (f folder) SyncData() error                         { return f.Sync() }
func (f folder) Prefetch(_, _ int64) error               { return nil }
func (f folder) Fd() uintptr                             { return vfs.InvalidFd }

// info is a vfs.Info as os.FileInfo. Dates are not kept.
type info struct{ i firnvfs.Info }

func (i info) Name() string       { return i.i.Name }
func (i info) Size() int64        { return i.i.Size }
func (i info) ModTime() time.Time { return time.Time{} }
func (i info) IsDir() bool        { return i.i.IsDir }
func (i info) Sys() any           { return nil }

func (i info) Mode() fs.FileMode {
	if i.i.IsDir {
		return fs.ModeDir | 0o755
	}
	return 0o644
}

func (i info) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }
