package pebblestore

import (
	"errors"
	"io"

	"github.com/cockroachdb/pebble/v2/vfs"

	firnvfs "firn.io/firn/internal/vfs"
)

// guard stands between Pebble and its files:
//
//   - A write that finds no room waits for it (Options.Room). Pebble would end the
//     process where it writes its manifest, and elsewhere try again without a pause.
//   - Any other error of a write or a sync is final (L8): the store has failed,
//     and Pebble is never answered. It would go on after a failed sync of a
//     table, and end the process, with all its other disks, after one of its manifest.
//
// None of Pebble's goroutines holds a lock of the database while it writes, but the
// one that opens it, so one that waits holds up no reader.
type guard struct {
	vfs.FS
	s *Store
}

// do runs op until it has found room. It does not return after an error that is
// final, nor once Open or Close has given the database up.
func (s *Store) do(op func() error) error {
	try := func() error {
		if s.abandoned.Load() {
			s.park(errAbandoned) // another process may have the folder now
		}
		return op()
	}
	for {
		var err error
		if s.room != nil {
			err = s.room.Do(try)
		} else {
			err = try()
		}
		if err == nil {
			return nil
		}
		if s.room == nil || !firnvfs.IsNoSpace(err) {
			s.fail(err)
			s.park(err)
		}
		s.mu.Lock()
		if s.serving {
			s.mu.Unlock()
			continue // the reserve was not told when it was asked that it may wait
		}
		s.note(err) // the store opens or closes
		s.mu.Unlock()
		select {}
	}
}

var errAbandoned = errors.New("the store was given up")

// park keeps a goroutine of Pebble's for good, and lets Open and Close know why.
func (s *Store) park(err error) {
	s.mu.Lock()
	s.note(err)
	s.mu.Unlock()
	select {}
}

// note says that a goroutine is parked. mu is held.
func (s *Store) note(err error) {
	if s.parkedBy == nil {
		s.parkedBy = err
		close(s.parked)
	}
}

// Create implements vfs.FS.
func (g guard) Create(name string, c vfs.DiskWriteCategory) (f vfs.File, err error) {
	err = g.s.do(func() error { f, err = g.FS.Create(name, c); return err })
	return g.wrap(f, err)
}

// OpenReadWrite implements vfs.FS.
func (g guard) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (f vfs.File, err error) {
	err = g.s.do(func() error { f, err = g.FS.OpenReadWrite(name, c, opts...); return err })
	return g.wrap(f, err)
}

// ReuseForWrite implements vfs.FS.
func (g guard) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (f vfs.File, err error) {
	err = g.s.do(func() error { f, err = g.FS.ReuseForWrite(from, to, c); return err })
	return g.wrap(f, err)
}

// OpenDir implements vfs.FS.
func (g guard) OpenDir(name string) (vfs.File, error) {
	f, err := g.FS.OpenDir(name)
	return g.wrap(f, err)
}

// Remove implements vfs.FS. Pebble tries a file again at its next start.
func (g guard) Remove(name string) error {
	if g.s.abandoned.Load() {
		g.s.park(errAbandoned)
	}
	return g.FS.Remove(name)
}

// Lock implements vfs.FS. The lock ends with Close also when the database does not.
func (g guard) Lock(name string) (io.Closer, error) {
	l, err := g.FS.Lock(name)
	if err == nil {
		g.s.lock = l
	}
	return l, err
}

// Rename implements vfs.FS.
func (g guard) Rename(from, to string) error {
	return g.s.do(func() error { return g.FS.Rename(from, to) })
}

func (g guard) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &guarded{f, g.s}, nil
}

// guarded is a file that Pebble writes.
type guarded struct {
	vfs.File
	s *Store
}

// Write implements io.Writer: what fitted before there was no room any more is not
// written again.
func (f *guarded) Write(p []byte) (n int, err error) {
	err = f.s.do(func() error {
		m, err := f.File.Write(p[n:])
		n += m
		return err
	})
	return n, err
}

// WriteAt implements io.WriterAt.
func (f *guarded) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.s.do(func() error { n, err = f.File.WriteAt(p, off); return err })
	return n, err
}

// Sync implements vfs.File.
func (f *guarded) Sync() error { return f.s.do(f.File.Sync) }

// SyncData implements vfs.File.
func (f *guarded) SyncData() error { return f.s.do(f.File.SyncData) }

// SyncTo implements vfs.File.
func (f *guarded) SyncTo(length int64) (full bool, err error) {
	err = f.s.do(func() error { full, err = f.File.SyncTo(length); return err })
	return full, err
}
