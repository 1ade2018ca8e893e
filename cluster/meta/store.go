// Package meta keeps what the cluster knows about itself: volumes, groups,
// nodes, gateways, owners and the elected coordinator.
//
// At the bottom is a Store: a small, ordered key-value store with
// transactions, leases and watches. Etcd is the kind of a real cluster (this
// package is the only importer of the etcd client); Mem is the kind of tests and
// of the simulator. One conformance suite, metatest, runs on both.
//
// On top is the catalog: typed values (VolumeMeta, GroupMeta, ...) under
// /firn/v1/ and functions that read and change them, each one transaction or a
// retried compare-and-set. They block, take a context first, and are made to be
// called in a Loop's Do(loop.Meta, ...). Two cores that live on a Loop, Session
// (a lease that is kept alive) and Mirror (a copy of a prefix that follows the
// store), are what most users need besides.
//
// What holds everywhere here:
//   - Watches are hints. Whatever is decided on what a watch or a list said is
//     written by a transaction that compares what was read.
//   - A transaction that failed with Unavailable may have happened. The
//     functions of the catalog can be called again with the same arguments: the
//     second call finds what the first one did, or says how it answers then.
//   - Leases decide who tries, epochs decide who succeeds (F3). No right to
//     change data follows from a key in here alone.
//   - Nothing is written periodically and there is no key per chunk.
//
// Etcd should run with auto-compaction (--auto-compaction-mode=periodic
// --auto-compaction-retention=1h; stock etcd never compacts) and a quota of up
// to 8 GiB; Etcd.Usage feeds the alarm at 60 % of it.
package meta

import (
	"context"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Revision counts the store's changes. A restore from a backup sets it back.
type Revision int64

// LeaseID names a lease; 0 is none.
type LeaseID int64

// KV is a key and its value, which nobody changes in place. An absent key has
// its Key only.
type KV struct {
	Key   string
	Value []byte
	// Created is the revision at which the key came into being, Modified that of
	// its last change. Both are 0 for an absent key.
	Created, Modified Revision
	// Lease is the lease that the key vanishes with, or 0.
	Lease LeaseID
}

// Exists tells whether the key was there.
func (kv KV) Exists() bool { return kv.Modified != 0 }

// Limits of one call; both kinds enforce them.
const (
	// MaxTxnOps bounds the conditions, the Then and the Else of a Txn, each.
	MaxTxnOps = 128
	// MaxValueBytes bounds one value.
	MaxValueBytes = 1 << 20
)

// Store is an ordered key-value store. Its methods may be called from any
// goroutine; all but Watch may block. Reads are linearizable: they see every
// change that was answered before they began.
//
// Errors: Unavailable when the store did not answer (of a Txn, Grant or Revoke
// it then is unknown whether it happened), Canceled when ctx was cancelled,
// NotFound for an unknown lease, Invalid for a call beyond the limits.
type Store interface {
	// Get returns the key, or a KV that does not exist.
	Get(ctx context.Context, key string) (KV, error)
	// List returns all keys that begin with prefix, in their order, as they were
	// at the returned revision. The prefix must not be empty.
	List(ctx context.Context, prefix string) ([]KV, Revision, error)
	// Txn does all of t.Then if all of t.If hold, otherwise all of t.Else,
	// atomically. One transaction changes a key at most once. NotFound: a Put
	// names a lease that has ended.
	Txn(ctx context.Context, t Txn) (TxnResult, error)
	// Grant makes a lease. Its keys vanish when it was not kept alive for ttl,
	// which is rounded up to whole seconds. The store may make it longer.
	Grant(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// KeepAlive makes the lease last for its whole time to live again, counted
	// from no earlier than when KeepAlive was called. NotFound: it has ended.
	KeepAlive(ctx context.Context, id LeaseID) error
	// Revoke ends the lease and removes its keys. An unknown lease is no error.
	Revoke(ctx context.Context, id LeaseID) error
	// Watch calls fn on l with what changes below prefix, until stop is called
	// on l; after that fn is not called again. It returns at once.
	//
	// The first notice, and the first after changes may have been missed
	// (compaction, a cut connection, a restored store), is a resync: everything
	// that changes after it is noticed, what was before must be listed again,
	// after it was received. Notices are in order of revision, may repeat what a
	// list has shown, and may be late by any time.
	Watch(l loop.Loop, prefix string, fn func(Notice)) (stop func())
	// Close ends all watches and frees what the store holds. Leases stay.
	Close() error
}

// Notice is what a watch tells.
type Notice struct {
	Resync  bool
	Changes []Change
}

// Change is one changed key.
type Change struct {
	// KV is the key as it is now. Of a deleted key, Value is empty and Modified
	// is the revision of the deletion.
	KV      KV
	Deleted bool
}

// Txn is a transaction.
type Txn struct {
	If         []Cond
	Then, Else []Op
}

// TxnResult is what a transaction did.
type TxnResult struct {
	// Succeeded tells whether the conditions held.
	Succeeded bool
	// Revision of the store after the transaction.
	Revision Revision
	// Read has one KV for each Read of the branch that was taken, in its order.
	Read []KV
}

type condKind uint8

const (
	condCreated condKind = iota
	condModified
	condValue
	condPresent
)

// Cond is a condition of a transaction.
type Cond struct {
	kind     condKind
	key      string
	revision Revision
	value    []byte
}

// Absent holds when the key does not exist.
func Absent(key string) Cond { return Cond{kind: condCreated, key: key} }

// Present holds when the key exists.
func Present(key string) Cond { return Cond{kind: condPresent, key: key} }

// CreatedAt holds when the key exists since revision r and was not deleted in
// between; with r = 0, when it does not exist.
func CreatedAt(key string, r Revision) Cond { return Cond{kind: condCreated, key: key, revision: r} }

// Unchanged holds when the key is as kv was read: same last change, or still absent.
func Unchanged(kv KV) Cond { return Cond{kind: condModified, key: kv.Key, revision: kv.Modified} }

// ValueIs holds when the key exists and has exactly this value. Against a store
// that was restored from a backup, only a value with a nonce in it proves that a
// key is still the one that was written.
func ValueIs(key string, value []byte) Cond { return Cond{kind: condValue, key: key, value: value} }

type opKind uint8

const (
	opPut opKind = iota
	opDelete
	opRead
)

// Op is one step of a transaction.
type Op struct {
	kind  opKind
	key   string
	value []byte
	lease LeaseID
}

// Put sets the key. With lease != 0 the key vanishes with the lease; with 0 it
// is freed of the lease it had. The value belongs to the store from then on.
func Put(key string, value []byte, lease LeaseID) Op {
	return Op{kind: opPut, key: key, value: value, lease: lease}
}

// Delete removes the key, if it exists.
func Delete(key string) Op { return Op{kind: opDelete, key: key} }

// Read returns the key in TxnResult.Read, as it is after the steps before it.
func Read(key string) Op { return Op{kind: opRead, key: key} }

var errNoPrefix = block.Errorf(block.Invalid, "list: the prefix is empty")

// check refuses what is beyond the limits of one transaction.
func (t *Txn) check() error {
	if len(t.If) > MaxTxnOps || len(t.Then) > MaxTxnOps || len(t.Else) > MaxTxnOps {
		return block.Errorf(block.Invalid, "a transaction of more than %d conditions or steps", MaxTxnOps)
	}
	for _, ops := range [][]Op{t.Then, t.Else} {
		changed := map[string]bool{}
		for _, op := range ops {
			if op.key == "" || len(op.value) > MaxValueBytes {
				return block.Errorf(block.Invalid, "a transaction with an empty key, or a value of %d bytes for %q", len(op.value), op.key)
			}
			if op.kind != opRead {
				if changed[op.key] {
					return block.Errorf(block.Invalid, "a transaction changes %q twice", op.key)
				}
				changed[op.key] = true
			}
		}
	}
	return nil
}
