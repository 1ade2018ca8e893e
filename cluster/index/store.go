package index

// Store is an ordered map of bytes on one disk. Batches become visible at once
// and whole, and durable in their order: a crash keeps everything that was
// committed before the last successful Flush began, and of what came later any
// prefix of batches. All methods may be called from any goroutine.
//
// An error of Commit or Flush is final (L8): the caller gives the disk up. Only a
// Flush of kind NoSpace is not.
type Store interface {
	// NewBatch returns an empty batch.
	NewBatch() Batch
	// Commit makes the batch visible. It does not wait for the disk to sync, but
	// may wait for room. The batch must not be used afterwards.
	Commit(Batch) error
	// Flush returns once every batch whose Commit returned before the call is
	// durable. Kind NoSpace when the file system is full: what was committed stays
	// visible, and a later Flush makes it durable.
	Flush() error
	// Snapshot pins what is visible now until its Close.
	Snapshot() Snapshot
	// Close ends the store without flushing. No snapshot may be open.
	Close() error
}

// Batch gathers changes, which take effect in the order of the calls. Keys and
// values are copied. Not for concurrent use.
type Batch interface {
	// Set maps key to value.
	Set(key, value []byte)
	// Delete removes key, if it is there.
	Delete(key []byte)
	// DeleteRange removes the keys in [from, to).
	DeleteRange(from, to []byte)
	// Size is about how many bytes the batch takes.
	Size() int
}

// Snapshot is an unchanging view of a store, for any goroutine.
type Snapshot interface {
	// Get appends the value of key to dst; ok is false without the key.
	Get(dst, key []byte) (value []byte, ok bool, err error)
	// Iterate returns an iterator over the keys in [from, to), before the first.
	Iterate(from, to []byte) (Iterator, error)
	// Close lets go of the view. Its iterators must be closed before.
	Close() error
}

// Iterator walks keys in ascending order. For one goroutine.
type Iterator interface {
	// Seek moves to the first key at or after key, which must not be before the
	// iterator's range. It returns false when there is none, or on an error.
	Seek(key []byte) bool
	// Next moves to the following key.
	Next() bool
	// Key and Value are valid until the iterator moves; the caller must not
	// change them.
	Key() []byte
	// Value is described at Key.
	Value() []byte
	// Err tells why Seek or Next returned false; nil at the end of the range.
	Err() error
	Close() error
}
