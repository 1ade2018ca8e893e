// Package backend holds what package nbd serves when it is embedded: the
// interface of an export's storage, in memory and in a file.
package backend

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"firn.io/firn/nbd"
)

// Backend is nbd.Backend: io.ReaderAt, io.WriterAt, Size and Sync.
type Backend = nbd.Backend

// Memory is a Backend of bytes in memory. Nothing of it is durable.
type Memory struct {
	mu    sync.RWMutex
	bytes []byte
}

// NewMemoryBackend serves p, which the Backend owns from then on.
func NewMemoryBackend(p []byte) *Memory { return &Memory{bytes: p} }

// ReadAt implements io.ReaderAt.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 || off > int64(len(m.bytes)) {
		return 0, io.EOF
	}
	n := copy(p, m.bytes[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt. It does not grow the Backend.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < 0 || off > int64(len(m.bytes))-int64(len(p)) {
		return 0, fmt.Errorf("write of %d bytes at %d beyond %d: %w", len(p), off, len(m.bytes), nbd.ENOSPC)
	}
	return copy(m.bytes[off:], p), nil
}

// Size implements Backend.
func (m *Memory) Size() (int64, error) { return int64(len(m.bytes)), nil }

// Sync implements Backend.
func (m *Memory) Sync() error { return nil }

// Trim implements nbd.Trimmer.
func (m *Memory) Trim(ctx context.Context, off, n int64, f nbd.Flags) error {
	return m.WriteZeroes(ctx, off, n, f)
}

// WriteZeroes implements nbd.Zeroer.
func (m *Memory) WriteZeroes(_ context.Context, off, n int64, _ nbd.Flags) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < 0 || n < 0 || off > int64(len(m.bytes))-n {
		return nbd.ENOSPC
	}
	clear(m.bytes[off : off+n])
	return nil
}

// File is a Backend of a file or block device of a fixed size. Sync makes it
// durable; where its file system can, it punches holes for trims and zeroes.
//
// A Sync that fails is final: the system may have dropped what it could not write,
// and would answer the next one with success. From then on every Sync, and every
// change, fails with the first error; reads go on. Serve the file anew (the process
// as well, if the device is sick) after its contents were checked.
type File struct {
	f    *os.File
	size int64
	// sync is f.Sync; tests replace it.
	sync func() error

	mu     sync.Mutex
	failed error // of the first sync that did
}

// NewFileBackend serves f, whose size it takes now. The caller closes f when no
// connection uses it.
func NewFileBackend(f *os.File) (*File, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	return &File{f: f, size: size, sync: f.Sync}, nil
}

// ReadAt implements io.ReaderAt.
func (b *File) ReadAt(p []byte, off int64) (int, error) { return b.f.ReadAt(p, off) }

// WriteAt implements io.WriterAt.
func (b *File) WriteAt(p []byte, off int64) (int, error) {
	if off > b.size-int64(len(p)) {
		return 0, nbd.ENOSPC
	}
	if err := b.lost(); err != nil {
		return 0, err
	}
	return b.f.WriteAt(p, off)
}

// Size implements Backend.
func (b *File) Size() (int64, error) { return b.size, nil }

// lost is why nothing of the file can be made durable any more, or nil.
func (b *File) lost() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failed
}

// Sync implements Backend.
func (b *File) Sync() error {
	if err := b.lost(); err != nil {
		return err
	}
	err := b.sync()
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil && b.failed == nil {
		b.failed = fmt.Errorf("a sync of %s failed, writes may be lost; nothing more is written: %w", b.f.Name(), err)
	}
	// Also if another one failed meanwhile: which writes that lost is not known.
	return b.failed
}

// Trim implements nbd.Trimmer: where holes cannot be punched nothing happens.
func (b *File) Trim(ctx context.Context, off, n int64, f nbd.Flags) error {
	if err := b.punch(off, n); err != nil && err != unix.EOPNOTSUPP {
		return err
	}
	return b.durable(f)
}

// WriteZeroes implements nbd.Zeroer.
func (b *File) WriteZeroes(ctx context.Context, off, n int64, f nbd.Flags) error {
	err := error(unix.EOPNOTSUPP)
	if f&nbd.NoHole == 0 {
		err = b.punch(off, n)
	}
	if err == unix.EOPNOTSUPP {
		if f&nbd.FastZero != 0 {
			return nbd.ENOTSUP
		}
		err = b.writeZeros(ctx, off, n)
	}
	if err != nil {
		return err
	}
	return b.durable(f)
}

func (b *File) punch(off, n int64) error {
	if err := b.lost(); err != nil {
		return err
	}
	return unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

var zeros [64 << 10]byte

func (b *File) writeZeros(ctx context.Context, off, n int64) error {
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := b.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

func (b *File) durable(f nbd.Flags) error {
	if f&nbd.FUA != 0 {
		return b.Sync()
	}
	return nil
}
