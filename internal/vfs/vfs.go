// Package vfs is the seam between Firn and file systems. OS is the machine's
// file system; Sim is a simulated disk that can crash, tear, rot, stall and
// fill. Both count what is read, written and synced per class of file, so that
// write amplification is measured and not guessed. vfstest holds the suite that
// both pass, pebblefs lends them to Pebble.
package vfs

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync/atomic"

	"firn.io/firn/internal/block"
)

// Align is what offsets, lengths and addresses of I/O to a direct file are
// multiples of, in bytes.
const Align = 4096

// Class tells files apart in the counters.
type Class uint8

const (
	// ClassOther is everything small: superblocks, marks, configuration.
	ClassOther Class = iota
	// ClassLog is segments of a seglog.
	ClassLog
	// ClassIndex is files of an index store.
	ClassIndex
	// ClassCache is a gateway's SSD cache.
	ClassCache
	// NumClasses is how many classes there are.
	NumClasses
)

var classNames = [NumClasses]string{"other", "log", "index", "cache"}

func (c Class) String() string { return classNames[c%NumClasses] }

// Flags say how a file is opened.
type Flags uint8

const (
	// ReadOnly refuses writes. Without it a file is opened for both.
	ReadOnly Flags = 1 << iota
	// Create makes the file if it is missing. Its name is durable only after
	// SyncDir of its folder.
	Create
	// Exclusive, with Create, fails with kind Exists if the file is there.
	Exclusive
	// Truncate empties the file.
	Truncate
	// Direct asks for I/O past the page cache. Where the file system refuses,
	// the file is opened without; Direct() tells.
	Direct
)

// ErrSync is in the chain of every error of Sync and SyncDir, which are of kind
// Internal whatever their cause is, a full file system included: what was
// written before is lost or not, and nobody knows (L8).
var ErrSync = errors.New("what was written may be lost")

func syncError(err error, name string) error {
	if IsNoSpace(err) {
		err = errors.New(err.Error()) // nobody may take it for a write that can be tried again
	}
	return block.Wrap(block.Internal, fmt.Errorf("%w: %w", ErrSync, err), "sync %s", name)
}

// File is an open file. Its methods may be called by many goroutines at once;
// overlapping writes at once have no defined order. Errors carry a kind:
// NoSpace for a full file system, Internal for an I/O error.
type File interface {
	// ReadAt fills p from off as io.ReaderAt does: at the end of the file it
	// returns what there is and io.EOF. Direct files want aligned p and off.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p at off, growing the file as needed. p is the
	// caller's again on return; nothing is durable before Sync. On error any
	// part may have been written. Direct files want aligned p and off.
	WriteAt(p []byte, off int64) (int, error)
	// WriteAtv writes the buffers one after the other from off on, as one
	// WriteAt of their concatenation but without making it.
	WriteAtv(bufs [][]byte, off int64) (int, error)
	// Sync makes all earlier writes, and the length that reading them back
	// needs, durable (fdatasync). After an error nothing is known about what
	// was written since the last success, and a later success means nothing (L8).
	Sync() error
	// Allocate reserves space for [off, off+n) and grows the file to cover it.
	// The new bytes read as zero. Kind NoSpace. Durable after Sync. Where a
	// file system cannot reserve, the file only grows.
	Allocate(off, n int64) error
	// Truncate sets the length. Durable after Sync.
	Truncate(size int64) error
	// Size is the length in bytes.
	Size() (int64, error)
	// Direct tells whether I/O goes past the page cache and must be aligned.
	Direct() bool
	// DropCache makes later reads come from the device as far as the system
	// allows. Unsynced bytes are not dropped.
	DropCache() error
	// Close lets go of the file. It syncs nothing.
	Close() error
}

// Info describes a file or folder.
type Info struct {
	Name  string // last element of the path
	Size  int64  // bytes; 0 for a folder
	IsDir bool
}

// Space is the room of the file system that holds a folder.
type Space struct {
	TotalBytes, FreeBytes int64
}

// Counts is what went through a file system since it was opened.
type Counts struct {
	Reads, ReadBytes     uint64
	Writes, WrittenBytes uint64
	Syncs                uint64 // of files and folders
}

// FS is a file system. Names are slash-separated paths. Errors carry a kind
// (NotFound, Exists, NoSpace, Busy) and keep the cause: errors.Is with the
// sentinels of io/fs holds. Methods may be called by many goroutines at once.
type FS interface {
	// Open opens a file. c is what its traffic counts as.
	Open(name string, f Flags, c Class) (File, error)
	// Remove removes a file or an empty folder. Durable after SyncDir.
	Remove(name string) error
	// RemoveAll removes a file or a folder and all below it; a missing one is
	// fine. Durable after SyncDir of the parent; a crash before leaves any part.
	RemoveAll(name string) error
	// Rename moves a file, atomically replacing what has the new name. Durable
	// after SyncDir of both folders.
	Rename(from, to string) error
	// List returns the names in a folder in their order.
	List(dir string) ([]string, error)
	// MkdirAll makes a folder and its parents, durably.
	MkdirAll(dir string) error
	// SyncDir makes all changes of names in a folder durable.
	SyncDir(dir string) error
	// Stat describes a file or folder.
	Stat(name string) (Info, error)
	// Lock takes an exclusive lock on a file, which it makes if it is missing.
	// Kind Busy when this or another process holds it. It ends with Close, or
	// with the process.
	Lock(name string) (io.Closer, error)
	// Space tells the size and the free room of the file system below dir.
	Space(dir string) (Space, error)
	// Counts is the traffic of one class so far.
	Counts(c Class) Counts
}

// counters are a Counts that many goroutines add to.
type counters struct {
	reads, readBytes, writes, writtenBytes, syncs atomic.Uint64
}

func (c *counters) read(n int) {
	c.reads.Add(1)
	c.readBytes.Add(uint64(max(n, 0)))
}

func (c *counters) wrote(n int) {
	c.writes.Add(1)
	c.writtenBytes.Add(uint64(max(n, 0)))
}

func (c *counters) counts() Counts {
	return Counts{Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(), Writes: c.writes.Load(),
		WrittenBytes: c.writtenBytes.Load(), Syncs: c.syncs.Load()}
}

// LockName is the file in a folder that Lock holds.
const LockName = "LOCK"

// Lock makes dir this process's own until the returned Closer is closed or the
// process ends. Kind Busy when another holder is alive.
func Lock(fs FS, dir string) (io.Closer, error) {
	if err := fs.MkdirAll(dir); err != nil {
		return nil, err
	}
	l, err := fs.Lock(path.Join(dir, LockName))
	switch {
	case err == nil:
		return l, nil
	case block.KindOf(err) == block.Busy:
		return nil, block.Errorf(block.Busy, "folder %s is in use by another process", dir)
	}
	return nil, block.Wrap(block.KindOf(err), err, "lock folder %s", dir)
}

// tempSuffix marks what WriteFileAtomic has not finished.
const tempSuffix = ".tmp"

// WriteFileAtomic gives the file the content p, durably on return. After a
// crash or an error the file has its old content or the new, never a mixture.
func WriteFileAtomic(fs FS, name string, p []byte) error {
	temp := name + tempSuffix
	f, err := fs.Open(temp, Create|Truncate, ClassOther)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fs.Rename(temp, name)
	}
	if err == nil {
		err = fs.SyncDir(path.Dir(name))
	}
	return err
}

// IsTemp tells whether name is left over from an unfinished WriteFileAtomic.
func IsTemp(name string) bool { return strings.HasSuffix(name, tempSuffix) }

// ReadFile returns a whole file of at most max bytes; a longer one is of kind
// Corrupt: nothing is allocated by a length that was not expected.
func ReadFile(fs FS, name string, max int64) ([]byte, error) {
	f, err := fs.Open(name, ReadOnly, ClassOther)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > max {
		return nil, block.Errorf(block.Corrupt, "%s has %d bytes, at most %d were expected", name, size, max)
	}
	p := make([]byte, size)
	if n, err := f.ReadAt(p, 0); err != nil && !(err == io.EOF && n == len(p)) {
		return nil, err
	}
	return p, nil
}
