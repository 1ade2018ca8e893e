// Package memstore is the index.Store of tests and of the simulator: a map in
// memory with the crash semantics that index.Store allows.
//
// The map is a persistent treap: a batch makes a new root and leaves the old
// ones as they were, so that a snapshot is a pointer and a crash is a choice
// among the roots since the last flush. Priorities come from the keys, so that
// equal contents have equal shapes.
package memstore

import (
	"bytes"
	"sync"

	"firn.io/firn/cluster/index"
	"firn.io/firn/internal/block"
)

// Store is an index.Store in memory. The zero value is empty and open.
type Store struct {
	mu sync.Mutex
	// roots[0] is durable, the last one is visible; one per batch between.
	roots  []*node
	open   int // snapshots
	failed error
	before func() error
	closed bool
}

// New returns an empty store.
func New() *Store { return &Store{roots: []*node{nil}} }

// Crash returns the store as a crash may leave it: everything flushed, and the
// first n of the batches after it (all, if there are fewer). s is not changed.
func (s *Store) Crash(n int) *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Store{roots: []*node{s.roots[min(n, len(s.roots)-1)]}}
}

// Unflushed is how many batches a crash may lose.
func (s *Store) Unflushed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.roots) - 1
}

// Fail makes Commit and Flush fail with err from now on.
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = err
}

// BeforeFlush makes fn run before each flush, which fails with its error; nil is
// none. It is for crashes between what a batch makes visible and its flush.
func (s *Store) BeforeFlush(fn func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = fn
}

// NewBatch returns an empty batch.
func (s *Store) NewBatch() index.Batch { return &batch{} }

// Commit makes the batch visible.
func (s *Store) Commit(b index.Batch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.err(); err != nil {
		return err
	}
	root := s.roots[len(s.roots)-1]
	for _, op := range b.(*batch).ops {
		switch {
		case op.to != nil:
			root = deleteRange(root, op.key, op.to)
		case op.remove:
			root = remove(root, op.key)
		default:
			root = insert(root, &node{key: op.key, value: op.value, priority: priority(op.key)})
		}
	}
	s.roots = append(s.roots, root)
	return nil
}

// Flush makes all batches durable.
func (s *Store) Flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.err(); err != nil {
		return err
	}
	if s.before != nil {
		if err := s.before(); err != nil {
			return err
		}
	}
	s.roots = []*node{s.roots[len(s.roots)-1]}
	return nil
}

func (s *Store) err() error {
	if s.closed {
		return block.Errorf(block.Internal, "memstore: used after Close")
	}
	return s.failed
}

// Snapshot pins the visible root.
func (s *Store) Snapshot() index.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return &snapshot{store: s, root: s.roots[len(s.roots)-1]}
}

// Close ends the store. The content stays available to Crash.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open > 0 {
		return block.Errorf(block.Internal, "memstore: closed with %d snapshots open", s.open)
	}
	s.closed = true
	return nil
}

type batch struct {
	ops  []op
	size int
}

type op struct {
	key, value, to []byte
	remove         bool
}

// Set maps key to value.
func (b *batch) Set(key, value []byte) {
	b.ops = append(b.ops, op{key: bytes.Clone(key), value: append([]byte{}, value...)})
	b.size += len(key) + len(value)
}

// Delete removes key.
func (b *batch) Delete(key []byte) {
	b.ops = append(b.ops, op{key: bytes.Clone(key), remove: true})
	b.size += len(key)
}

// DeleteRange removes [from, to).
func (b *batch) DeleteRange(from, to []byte) {
	b.ops = append(b.ops, op{key: bytes.Clone(from), to: append([]byte{}, to...)})
	b.size += len(from) + len(to)
}

// Size is the bytes of keys and values.
func (b *batch) Size() int { return b.size }

type snapshot struct {
	store *Store
	root  *node
}

// Get returns the value of key.
func (s *snapshot) Get(dst, key []byte) ([]byte, bool, error) {
	for n := s.root; n != nil; {
		switch c := bytes.Compare(key, n.key); {
		case c == 0:
			return append(dst, n.value...), true, nil
		case c < 0:
			n = n.left
		default:
			n = n.right
		}
	}
	return dst, false, nil
}

// Iterate walks [from, to).
func (s *snapshot) Iterate(from, to []byte) (index.Iterator, error) {
	return &iterator{root: s.root, from: bytes.Clone(from), to: bytes.Clone(to)}, nil
}

// Close lets go of the view.
func (s *snapshot) Close() error {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.store.open--
	return nil
}

type iterator struct {
	root     *node
	from, to []byte
	path     []*node // the current node and those ancestors that follow it
}

// Seek moves to the first key at or after key.
func (it *iterator) Seek(key []byte) bool {
	it.path = it.path[:0]
	for n := it.root; n != nil; {
		if bytes.Compare(n.key, key) < 0 {
			n = n.right
			continue
		}
		it.path = append(it.path, n)
		n = n.left
	}
	return it.valid()
}

// Next moves to the following key.
func (it *iterator) Next() bool {
	if len(it.path) == 0 {
		return false
	}
	n := it.path[len(it.path)-1].right
	it.path = it.path[:len(it.path)-1]
	for ; n != nil; n = n.left {
		it.path = append(it.path, n)
	}
	return it.valid()
}

func (it *iterator) valid() bool {
	if len(it.path) > 0 && bytes.Compare(it.Key(), it.to) < 0 {
		return true
	}
	it.path = it.path[:0]
	return false
}

// Key is the current key.
func (it *iterator) Key() []byte { return it.path[len(it.path)-1].key }

// Value is the current value.
func (it *iterator) Value() []byte { return it.path[len(it.path)-1].value }

// Err is always nil.
func (it *iterator) Err() error { return nil }

// Close ends the walk.
func (it *iterator) Close() error { return nil }
