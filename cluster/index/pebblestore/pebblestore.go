// Package pebblestore is the index.Store of production, over Pebble. It is the
// only part of the index that knows Pebble; goroutines here are Pebble's.
package pebblestore

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"firn.io/firn/cluster/index"
	"firn.io/firn/internal/block"
	firnvfs "firn.io/firn/internal/vfs"
)

// Options configure a store. Sizes are bytes.
type Options struct {
	// FS is where the files are. Nil is the operating system's file system.
	FS vfs.FS
	// Room is asked when the file system is full: what is written then waits. Nil:
	// a full file system is the end of the store.
	Room *firnvfs.Reserve
	// CacheBytes bounds the cache of decoded blocks; 0 takes DefaultCacheBytes.
	CacheBytes int64
	// MemTableBytes is how much is gathered between flushes; 0 takes
	// DefaultMemTableBytes.
	MemTableBytes uint64
	// Log takes what Pebble has to say; nil drops it.
	Log *slog.Logger
	// Failed, if set, is told the first error of background work. It is called
	// on a goroutine of Pebble's. The disk is to be given up (L8); Flush fails
	// from then on.
	Failed func(error)
}

// Defaults of Options.
const (
	DefaultCacheBytes    = 64 << 20
	DefaultMemTableBytes = 32 << 20
)

// blockBytes is small, since look-ups are single and random: a block is read
// and decoded whole.
const blockBytes = 4 << 10

// Store is an index.Store over a Pebble database without a log of its own: what
// was not flushed is in the log of the disk.
type Store struct {
	db     *pebble.DB
	failed func(error)

	once  sync.Once
	err   error
	broke chan struct{} // closed once err is set

	flush    sync.Mutex      // one Flush at a time
	flushing <-chan struct{} // of Pebble's flush that the last one did not wait for

	// Of guard. A goroutine that is parked never goes on.
	room      *firnvfs.Reserve
	lock      io.Closer
	abandoned atomic.Bool   // Open or Close has returned without Pebble's
	parked    chan struct{} // closed once a goroutine of Pebble's is parked
	mu        sync.Mutex
	serving   bool  // between Open and Close; under mu
	parkedBy  error // why one is parked; under mu
}

// Open opens or creates the store in dir. Kinds Busy when another process has
// it, NoSpace, Corrupt, Unsupported (written by another build), Internal. What is
// corrupt is not written to, but for notes of Pebble's own.
func Open(dir string, o Options) (*Store, error) {
	s := &Store{failed: o.Failed, broke: make(chan struct{}), room: o.Room, parked: make(chan struct{})}
	p := s.options(o)
	if err := check(dir, p.FS); err != nil {
		return nil, openError(dir, err)
	}
	opened := make(chan error, 1)
	go func() {
		db, err := open(dir, p)
		s.db = db
		opened <- err
	}()
	select {
	case err := <-opened:
		if err != nil {
			return nil, openError(dir, err)
		}
	case <-s.parked:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parkedBy != nil {
		return nil, openError(dir, cmp.Or(s.abandon(), s.parkedBy))
	}
	s.serving = true
	if s.room != nil {
		s.room.Serve()
	}
	return s, nil
}

// open opens the database. What Pebble takes for the end of the process, a manifest
// that cannot be written, is an error.
func open(dir string, o *pebble.Options) (db *pebble.DB, err error) {
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(fatal)
			if !ok {
				panic(r)
			}
			err = f.err
		}
	}()
	return pebble.Open(dir, o)
}

// check refuses what Pebble would take for an empty folder: one with tables and
// without the name of the manifest that they belong to.
func check(dir string, fs vfs.FS) error {
	desc, err := pebble.Peek(dir, fs)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return block.Wrap(block.Unsupported, err, "which format it has is not known here")
	}
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !desc.Exists && strings.HasSuffix(name, ".sst") {
			return block.Errorf(block.Corrupt, "the name of its manifest (%s/marker.manifest.*) is gone, and tables such as %s are there", dir, name)
		}
	}
	return nil
}

// openError says what to do.
func openError(dir string, err error) error {
	switch {
	case firnvfs.IsNoSpace(err):
		return block.Wrap(block.NoSpace, err, "open the index in %s: make room in its file system, and start again", dir)
	case errors.Is(err, block.Unsupported):
		return block.Wrap(block.Unsupported, firstLine{err}, "open the index in %s: start the build of Firn that wrote it, or a newer one", dir)
	case isCorrupt(err):
		return block.Wrap(block.Corrupt, firstLine{err}, "open the index in %s: it is damaged; replace the disk, and its replicas are filled from others", dir)
	}
	return block.Wrap(block.KindOf(err), err, "open the index in %s", dir)
}

// isCorrupt tells whether Pebble refused what it found, or lacked a file: its own
// errors have no kind and no number of the system's.
func isCorrupt(err error) bool {
	var number syscall.Errno
	var kind *block.Error
	return pebble.IsCorruptionError(err) || errors.Is(err, block.Corrupt) || errors.Is(err, iofs.ErrNotExist) ||
		!errors.As(err, &number) && !errors.As(err, &kind)
}

// firstLine is an error without the details that Pebble adds for its developers.
type firstLine struct{ err error }

func (f firstLine) Error() string {
	line, _, _ := strings.Cut(f.err.Error(), "\n")
	return line
}

// Unwrap returns the whole.
func (f firstLine) Unwrap() error { return f.err }

func (s *Store) options(o Options) *pebble.Options {
	if o.CacheBytes == 0 {
		o.CacheBytes = DefaultCacheBytes
	}
	if o.MemTableBytes == 0 {
		o.MemTableBytes = DefaultMemTableBytes
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.FS == nil {
		o.FS = vfs.Default
	}
	p := &pebble.Options{
		FS:                          guard{o.FS, s},
		DisableWAL:                  true,
		CacheSize:                   o.CacheBytes,
		MemTableSize:                o.MemTableBytes,
		FormatMajorVersion:          pebble.FormatNewest,
		MemTableStopWritesThreshold: 8,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       64,
		LBaseMaxBytes:               int64(o.MemTableBytes) * 2,
		CompactionConcurrencyRange:  func() (lower, upper int) { return 1, 2 },
		Logger:                      logger{o.Log},
		EventListener: &pebble.EventListener{
			BackgroundError: s.fail,
			DataCorruption:  func(i pebble.DataCorruptionInfo) { s.fail(i.Details) },
		},
	}
	for i := range p.Levels {
		p.Levels[i].BlockSize = blockBytes
		p.Levels[i].IndexBlockSize = 16 << 10
	}
	return p
}

// fail notes the first error of background work. That a start found no room is
// none: what it left undone is tried again.
func (s *Store) fail(err error) {
	if firnvfs.IsNoSpace(err) && s.room != nil {
		return
	}
	kind := block.Internal
	if pebble.IsCorruptionError(err) {
		kind = block.Corrupt
	}
	s.once.Do(func() {
		s.err = block.Wrap(kind, firstLine{err}, "index: background work")
		close(s.broke)
		if s.failed != nil {
			s.failed(s.err)
		}
	})
}

// NewBatch returns an empty batch.
func (s *Store) NewBatch() index.Batch { return &batch{b: s.db.NewBatch()} }

// Commit makes the batch visible.
func (s *Store) Commit(b index.Batch) error {
	p := b.(*batch)
	if p.err != nil {
		return p.err
	}
	if err := s.db.Apply(p.b, pebble.NoSync); err != nil {
		return block.Wrap(block.Internal, err, "index: commit")
	}
	if err := p.b.Close(); err != nil {
		return block.Wrap(block.Internal, err, "index: commit")
	}
	return nil
}

// Flush writes the memtables out. Pebble tries a flush that failed again for
// ever; it counts as failed here at the first error. Kind NoSpace when it waits
// for room: it goes on by itself, and a later Flush tells how it ended.
func (s *Store) Flush() error {
	s.flush.Lock()
	defer s.flush.Unlock()
	select {
	case <-s.broke:
		return s.err
	default:
	}
	// One that waits is not followed by another: each takes a memtable, of which
	// Pebble holds a few before it stops.
	if s.flushing != nil {
		if err := s.await(s.flushing); err != nil {
			return err
		}
	}
	done, err := s.db.AsyncFlush()
	if err != nil {
		return block.Wrap(block.Internal, err, "index: flush")
	}
	return s.await(done)
}

// await waits for a flush of Pebble's, unless that waits for room.
func (s *Store) await(done <-chan struct{}) error {
	s.flushing = done
	var waits <-chan struct{}
	if s.room != nil {
		waits = s.room.Waits()
	}
	select {
	case <-done:
		s.flushing = nil
		// An error of another flush, or of a compaction, may have come first.
		select {
		case <-s.broke:
			return s.err
		default:
			return nil
		}
	case <-waits:
		return block.Errorf(block.NoSpace, "index: the flush waits for room in the file system")
	case <-s.broke:
		return s.err
	}
}

// Snapshot pins what is visible.
func (s *Store) Snapshot() index.Snapshot { return &snapshot{s.db.NewSnapshot()} }

// Close closes the database without flushing. One that has failed, or that waits for
// room, is left as a crash leaves it, up to the end of the process.
func (s *Store) Close() error {
	s.mu.Lock()
	s.serving = false
	s.mu.Unlock()
	if s.room != nil {
		s.room.End()
	}
	select {
	case <-s.parked:
		return s.abandon()
	default:
	}
	closed := make(chan error, 1)
	go func() { closed <- s.db.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			return block.Wrap(block.Internal, err, "index: close")
		}
		return nil
	case <-s.parked:
		return s.abandon()
	}
}

func (s *Store) abandon() error {
	s.abandoned.Store(true)
	if s.lock == nil {
		return nil
	}
	if err := s.lock.Close(); err != nil {
		return block.Wrap(block.Internal, err, "index: close")
	}
	return nil
}

// Metrics are Pebble's own.
func (s *Store) Metrics() *pebble.Metrics { return s.db.Metrics() }

type batch struct {
	b   *pebble.Batch
	err error
}

func (b *batch) note(err error) {
	if err != nil && b.err == nil {
		b.err = block.Wrap(block.Internal, err, "index: batch")
	}
}

// Set maps key to value.
func (b *batch) Set(key, value []byte) { b.note(b.b.Set(key, value, nil)) }

// Delete removes key.
func (b *batch) Delete(key []byte) { b.note(b.b.Delete(key, nil)) }

// DeleteRange removes [from, to).
func (b *batch) DeleteRange(from, to []byte) {
	if bytes.Compare(from, to) < 0 {
		b.note(b.b.DeleteRange(from, to, nil))
	}
}

// Size is the encoded size.
func (b *batch) Size() int { return b.b.Len() }

type snapshot struct{ s *pebble.Snapshot }

// Get returns the value of key.
func (s *snapshot) Get(dst, key []byte) ([]byte, bool, error) {
	value, closer, err := s.s.Get(key)
	switch {
	case errors.Is(err, pebble.ErrNotFound):
		return dst, false, nil
	case err != nil:
		return dst, false, readError(err)
	}
	dst = append(dst, value...)
	if err := closer.Close(); err != nil {
		return dst, false, readError(err)
	}
	return dst, true, nil
}

// Iterate walks [from, to).
func (s *snapshot) Iterate(from, to []byte) (index.Iterator, error) {
	it, err := s.s.NewIter(&pebble.IterOptions{LowerBound: bytes.Clone(from), UpperBound: bytes.Clone(to)})
	if err != nil {
		return nil, readError(err)
	}
	return &iterator{it: it}, nil
}

// Close lets go of the view.
func (s *snapshot) Close() error {
	if err := s.s.Close(); err != nil {
		return readError(err)
	}
	return nil
}

type iterator struct {
	it  *pebble.Iterator
	err error
}

// Seek moves to the first key at or after key.
func (it *iterator) Seek(key []byte) bool { return it.at(it.it.SeekGE(key)) }

// Next moves to the following key.
func (it *iterator) Next() bool { return it.at(it.it.Next()) }

func (it *iterator) at(ok bool) bool {
	if !ok {
		if err := it.it.Error(); err != nil && it.err == nil {
			it.err = readError(err)
		}
	}
	return ok
}

// Key is the current key.
func (it *iterator) Key() []byte { return it.it.Key() }

// Value is the current value.
func (it *iterator) Value() []byte { return it.it.Value() }

// Err tells why the walk ended.
func (it *iterator) Err() error { return it.err }

// Close ends the walk.
func (it *iterator) Close() error {
	if err := it.it.Close(); err != nil {
		return readError(err)
	}
	return nil
}

func readError(err error) error {
	kind := block.Internal
	if pebble.IsCorruptionError(err) {
		kind = block.Corrupt
	}
	return block.Wrap(kind, firstLine{err}, "index: read")
}

// logger passes Pebble's messages on.
type logger struct{ l *slog.Logger }

// Infof is of no interest but to developers.
func (l logger) Infof(format string, args ...any) {
	l.l.Debug("pebble", "text", fmt.Sprintf(format, args...))
}

// Errorf reports what Pebble could not do.
func (l logger) Errorf(format string, args ...any) {
	l.l.Error("pebble", "text", fmt.Sprintf(format, args...))
}

// fatal is what Fatalf panics with.
type fatal struct{ err error }

// Fatalf is called for errors that Pebble does not survive; it must not return.
// guard lets no error of a file through to where Pebble calls it.
func (l logger) Fatalf(format string, args ...any) {
	f := fatal{fmt.Errorf("pebble: "+format, args...)}
	for _, a := range args {
		if err, ok := a.(error); ok {
			f.err = err
		}
	}
	panic(f)
}
