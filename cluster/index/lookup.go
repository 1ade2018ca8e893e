package index

import (
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// Kind says where an extent's bytes are. Values are stored.
type Kind uint8

const (
	// KindLocal is in a segment of this disk.
	KindLocal Kind = 0
	// KindZero reads as zeros and has no bytes.
	KindZero Kind = 1
	// KindCold is in a cold object.
	KindCold Kind = 2
)

// Place says where the bytes of a run are.
type Place struct {
	Kind Kind
	// At is the first block's place (KindLocal).
	At seglog.Location
	// Framed bytes are one stored unit of up to 16 blocks that is decoded as a
	// whole; the run begins Skip blocks into it. Cold extents always are.
	Framed bool
	Skip   uint8
	Codec  uint8
	Key    block.KeyID
	Stored uint32 // bytes
	// Object is the number of the cold object in the chunk's record, and Offset
	// the frame's first byte in it (KindCold).
	Object, Offset uint32
}

// Query asks for Count blocks of one chunk, at least one and not beyond its end.
type Query struct {
	Volume     block.VolumeID
	Generation block.Generation // of the view; GenerationLatest
	Chunk      block.Chunk
	Block      block.Index
	Count      uint16
}

// Run is a run of blocks that come from consecutive blocks of one extent, or
// that have none.
type Run struct {
	Block block.Index
	Count uint16
	State block.ExtentState
	// The rest is of data: where it is, one CRC per block, and the command that
	// wrote it.
	Place      Place
	CRCs       []uint32
	Generation block.Generation
	Written    block.Version
}

// Lookup is one read of the index. It is of one view: the state at the applied
// index at which it was made, whenever the rest of it is loaded (R1).
//
//	l := r.Lookup(q)
//	if l.Pending() { loop.Do(DiskRead, func() { err = l.Load() }, use) } else { use() }
//	... l.Runs() ...
//	l.Release()
type Lookup struct {
	db      *DB
	local   localID
	volume  uint32
	q       Query
	applied block.Version
	snap    *sharedSnapshot // set while the store has to be asked
	slots   []slot
	runs    []Run
	crcs    []uint32
}

// slot is the newest that was found for a block.
type slot struct {
	state   slotState
	final   bool // nothing in the layers below is newer
	moved   bool // the extent was moved: a layer below may hold a newer one
	gen     block.Generation
	written block.Version
	place   Place
	crc     uint32
}

type slotState uint8

const (
	slotEmpty slotState = iota
	slotZero
	slotData
)

// offer takes a candidate if it is newer than what the slot has; the layers
// are asked from the newest down, so a tie stays with the newer one (S10).
func (s *slot) offer(gen block.Generation, written block.Version) bool {
	if s.state != slotEmpty && (s.gen > gen || s.gen == gen && s.written >= written) {
		return false
	}
	s.gen, s.written = gen, written
	return true
}

// Lookup answers from memory as far as it can: completely if the delta or the
// chunk's version say everything, as for recent writes, for trimmed and for
// never-written chunks. A volume that is unknown or deleted reads as a hole.
// A Query out of range is a bug of the caller and panics.
func (r *Replica) Lookup(q Query) *Lookup {
	if q.Count == 0 || int(q.Block)+int(q.Count) > block.BlocksPerChunk {
		panic("index: look-up beyond its chunk")
	}
	l := r.db.newLookup()
	l.q, l.local, l.applied = q, r.local, r.AppliedVersion()
	if cap(l.slots) < int(q.Count) {
		l.slots = make([]slot, q.Count)
	}
	l.slots = l.slots[:q.Count]
	clear(l.slots)
	v := r.volumes[q.Volume]
	if v == nil || v.record.Tombstone {
		return l
	}
	last, known := v.chunks.get(q.Chunk)
	if !known {
		return l
	}
	l.volume = v.number
	gen, written, marked := v.markers.newest(q.Chunk, q.Generation)
	if !marked || written < last {
		l.memory(v.delta)
		l.memory(v.frozen)
	}
	if marked {
		// Nothing is newer than the chunk's version, and nothing of the store
		// newer than the checkpoint in it.
		final := written >= last || written > block.MakeVersion(r.group.era, r.committed)
		for i := range l.slots {
			if s := &l.slots[i]; s.offer(gen, written) {
				s.state, s.final = slotZero, final
			}
		}
	}
	for i := range l.slots {
		if !l.slots[i].final && r.catalog {
			l.snap = r.db.acquire()
			break
		}
	}
	return l
}

func (db *DB) newLookup() *Lookup {
	if n := len(db.free); n > 0 {
		l := db.free[n-1]
		db.free = db.free[:n-1]
		return l
	}
	return &Lookup{db: db}
}

// memory asks a delta.
func (l *Lookup) memory(d *volumeDelta) {
	if d == nil {
		return
	}
	c := d.chunks[l.q.Chunk]
	if c == nil {
		return
	}
	first, end := uint16(l.q.Block), uint16(l.q.Block)+l.q.Count
	for i := c.search(first &^ (cellBlocks - 1)); i < len(c.extents) && c.extents[i].block < end; i++ {
		e := &c.extents[i]
		if e.gen > l.q.Generation {
			continue
		}
		for b := max(e.block, first); b < min(e.block+uint16(e.count), end); b++ {
			s := &l.slots[b-first]
			if e.live&(1<<(b-e.block)) == 0 || s.final || !s.offer(e.gen, e.written) {
				continue
			}
			if s.state = slotZero; !e.zero() {
				s.state = slotData
				s.place = Place{Kind: KindLocal, At: seglog.Location{Segment: e.segment, Block: e.at + b - e.block}}
				s.crc = c.crcAt(e, b-e.block)
			}
			s.moved = e.flags&extentMoved != 0
		}
	}
	for i := range l.slots {
		s := &l.slots[i]
		s.final = s.state != slotEmpty && !s.moved
	}
}

// Applied is the index that the look-up is of.
func (l *Lookup) Applied() block.Version { return l.applied }

// Pending tells whether the store has to be asked.
func (l *Lookup) Pending() bool { return l.snap != nil }

// Load asks the store. It blocks and may be called off the Loop, once.
func (l *Lookup) Load() error {
	first := uint16(l.q.Block)
	from := appendExtentPrefix(nil, l.local, l.volume, l.q.Chunk, first&^(cellBlocks-1))
	to := appendExtentPrefix(nil, l.local, l.volume, l.q.Chunk, first+l.q.Count)
	return scan(l.snap, from, to, func(key, value []byte) (err error) {
		k, ok := decodeExtentKey(key)
		if !ok {
			return corrupt("extent key", key)
		}
		if k.gen > l.q.Generation {
			return nil
		}
		var e stored
		if l.crcs, err = decodeExtent(&e, k.block, value, l.crcs[:0]); err != nil {
			return err
		}
		for b := max(k.block, first); b < min(k.block+uint16(e.count), first+l.q.Count); b++ {
			s := &l.slots[b-first]
			if s.final || !s.offer(k.gen, k.written) {
				continue
			}
			if s.state = slotZero; e.place.Kind != KindZero {
				s.state = slotData
				s.place = e.place.forward(b - k.block)
				s.crc = e.crcs[b-k.block]
			}
		}
		return nil
	})
}

// Runs returns the runs, in order, that cover exactly what was asked. A pending
// look-up must be loaded first. They are valid until Release.
func (l *Lookup) Runs() []Run {
	l.runs, l.crcs = l.runs[:0], l.crcs[:0]
	if cap(l.crcs) < len(l.slots) {
		l.crcs = make([]uint32, 0, len(l.slots))
	}
	for i := range l.slots {
		s := &l.slots[i]
		b := l.q.Block + block.Index(i)
		if n := len(l.runs); n > 0 && l.runs[n-1].extend(s) {
			if s.state == slotData {
				l.crcs = append(l.crcs, s.crc)
				l.runs[n-1].CRCs = l.crcs[len(l.crcs)-int(l.runs[n-1].Count):]
			}
			continue
		}
		run := Run{Block: b, Count: 1, State: s.extentState()}
		if s.state == slotData {
			l.crcs = append(l.crcs, s.crc)
			run.Place, run.CRCs, run.Generation, run.Written = s.place, l.crcs[len(l.crcs)-1:], s.gen, s.written
		}
		l.runs = append(l.runs, run)
	}
	return l.runs
}

func (s *slot) extentState() block.ExtentState {
	switch s.state {
	case slotData:
		return block.Data
	case slotZero:
		return block.Zero
	}
	return block.Hole
}

// extend adds the next block to the run if its bytes follow.
func (r *Run) extend(s *slot) bool {
	if r.State != s.extentState() {
		return false
	}
	if s.state == slotData && (r.Written != s.written || r.Generation != s.gen || r.Place.forward(r.Count) != s.place) {
		return false
	}
	r.Count++
	return true
}

// Release ends the use, on the Loop. Load must not be running.
func (l *Lookup) Release() {
	if l.snap != nil {
		l.db.release(l.snap)
		l.snap = nil
	}
	if len(l.db.free) < maxFreeLookups {
		l.db.free = append(l.db.free, l)
	}
}

const maxFreeLookups = 256
