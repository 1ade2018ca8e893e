package index

import (
	"bytes"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// Record is one record of a replica as it travels to another one: the key
// without the local id, so that it begins with its kind, and the value, both as
// docs/format/index.md has them. Places in extents are the sender's.
type Record struct {
	Key, Value []byte
}

// recordOverhead is what a record takes in a page besides key and value.
const recordOverhead = 8

// View is the state of a replica as of its last checkpoint, which does not
// change. It pins a snapshot of the store; the blocks that its extents point at
// are pinned by the caller (seglog.Log.Pin, taken in the same turn).
type View struct {
	db    *DB
	snap  *sharedSnapshot
	local localID
}

// Unmerged tells whether memory holds changes that a View would lack.
func (r *Replica) Unmerged() bool {
	return r.group.applied != r.committed || len(r.touched) > 0 || len(r.dirty) > 0
}

// View pins the state of the last checkpoint; nil before the first, and while
// a copy is being installed.
func (r *Replica) View() *View {
	if !r.catalog || r.removed || r.installing != nil {
		return nil
	}
	return &View{db: r.db, snap: r.db.acquire(), local: r.local}
}

// DataBytes is about how many bytes of this disk the replica's data take.
func (r *Replica) DataBytes() int64 {
	n := int64(0)
	for _, v := range r.order {
		n += r.Usage(v.record.Volume)
	}
	return n
}

// Release ends the use, on the Loop. Scan and Place must not be running.
func (v *View) Release() { v.db.release(v.snap) }

// copied tells whether records of a kind travel.
func copied(kind byte) bool {
	switch kind {
	case kindGroup, kindVolume, kindValue, kindMarker, kindChunk, kindExtent:
		return true
	}
	return false
}

// Scan returns records with keys in [from, to), in order, at least one and
// then as many as fit maxBytes; next is the key to go on at, nil at the end. It
// blocks and may be called off the Loop. Kind Invalid for a range that does not
// travel.
func (v *View) Scan(from, to []byte, maxBytes int) (recs []Record, next []byte, err error) {
	if len(from) == 0 || len(to) == 0 || len(from) > extentLen || len(to) > extentLen || bytes.Compare(from, to) >= 0 ||
		!copied(from[0]) || from[0] < kindLive && to[0] > kindLive || to[0] > kindExtent+1 {
		return nil, nil, block.Errorf(block.Invalid, "index: a scan of [%x, %x)", from, to)
	}
	it, err := v.snap.Iterate(appendLocal(nil, v.local, from), appendLocal(nil, v.local, to))
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if cerr := it.Close(); err == nil {
			err = cerr
		}
	}()
	size := 0
	for ok := it.Seek(appendLocal(nil, v.local, from)); ok; ok = it.Next() {
		key := it.Key()[headLen-1:]
		if size += len(key) + len(it.Value()) + recordOverhead; size > maxBytes && len(recs) > 0 {
			return recs, bytes.Clone(key), nil
		}
		recs = append(recs, Record{bytes.Clone(key), bytes.Clone(it.Value())})
	}
	return recs, nil, it.Err()
}

func appendLocal(dst []byte, l localID, key []byte) []byte {
	return append(appendHead(dst, l, 0)[:headLen-1], key...)
}

// Place says where count blocks of an extent are, from its block skip on, by
// the extent's key as in a Record. It blocks and may be called off the Loop.
// Kinds NotFound, Invalid.
func (v *View) Place(key []byte, skip, count uint8) (at seglog.Location, crcs []uint32, err error) {
	full := appendLocal(nil, v.local, key)
	k, ok := decodeExtentKey(full)
	if !ok {
		return at, nil, block.Errorf(block.Invalid, "index: %x is not the key of an extent", key)
	}
	value, ok, err := v.snap.Get(nil, full)
	if err != nil {
		return at, nil, err
	}
	if !ok {
		return at, nil, block.Errorf(block.NotFound, "index: no extent %x", key)
	}
	var e stored
	if _, err := decodeExtent(&e, k.block, value, nil); err != nil {
		return at, nil, err
	}
	if e.place.Kind != KindLocal || e.place.Framed || count == 0 || int(skip)+int(count) > int(e.count) {
		return at, nil, block.Errorf(block.Invalid, "index: blocks %d+%d of an extent of %d, kind %d", skip, count, e.count, e.place.Kind)
	}
	return e.place.forward(uint16(skip)).At, e.crcs[skip : skip+count], nil
}
