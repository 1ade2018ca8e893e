// Package pebblestore is the index.Store of production, over Pebble. It is the
// only part of the index that knows Pebble; goroutines here are Pebble's.
package pebblestore

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"firn.io/firn/cluster/index"
	"firn.io/firn/internal/block"
)

// Options configure a store. Sizes are bytes.
type Options struct {
	// FS is where the files are. Nil is the operating system's file system.
	FS vfs.FS
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
}

// Open opens or creates the store in dir. Kinds Busy when another process has
// it, Corrupt, Internal.
func Open(dir string, o Options) (*Store, error) {
	s := &Store{failed: o.Failed, broke: make(chan struct{})}
	db, err := pebble.Open(dir, s.options(o))
	if err != nil {
		kind := block.Internal
		if errors.Is(err, pebble.ErrCorruption) {
			kind = block.Corrupt
		}
		return nil, block.Wrap(kind, err, "open the index in %s", dir)
	}
	s.db = db
	return s, nil
}

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
	p := &pebble.Options{
		FS:                          o.FS,
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

// fail notes the first error of background work.
func (s *Store) fail(err error) {
	s.once.Do(func() {
		s.err = block.Wrap(block.Internal, err, "index: background write")
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
// ever; it counts as failed here at the first error.
func (s *Store) Flush() error {
	select {
	case <-s.broke:
		return s.err
	default:
	}
	done, err := s.db.AsyncFlush()
	if err != nil {
		return block.Wrap(block.Internal, err, "index: flush")
	}
	select {
	case <-done:
		// An error of another flush, or of a compaction, may have come first.
		select {
		case <-s.broke:
			return s.err
		default:
			return nil
		}
	case <-s.broke:
		return s.err
	}
}

// Snapshot pins what is visible.
func (s *Store) Snapshot() index.Snapshot { return &snapshot{s.db.NewSnapshot()} }

// Close closes the database without flushing.
func (s *Store) Close() error {
	if err := s.db.Close(); err != nil {
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
	if errors.Is(err, pebble.ErrCorruption) {
		kind = block.Corrupt
	}
	return block.Wrap(kind, err, "index: read")
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

// Fatalf is called for errors that Pebble does not survive; it must not return.
func (l logger) Fatalf(format string, args ...any) {
	panic("pebble: " + fmt.Sprintf(format, args...))
}
