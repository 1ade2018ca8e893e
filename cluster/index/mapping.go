package index

import (
	"bytes"
	"slices"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// MapQuery asks which blocks of the chunks [From, To) of the group hold data.
type MapQuery struct {
	Volume     block.VolumeID
	Generation block.Generation
	From, To   block.Chunk
	// Max is about how many runs to return; a chunk is never cut, so that a
	// little more may come.
	Max int
}

// What one mapping takes from memory, which is copied on the Loop.
const (
	maxMapChunks  = 256
	maxMapExtents = 8192
)

// Mapping is the answer to a MapQuery, used like a Lookup: it is of one view.
type Mapping struct {
	db      *DB
	local   localID
	volume  uint32
	q       MapQuery
	applied block.Version
	snap    *sharedSnapshot // set while the store has to be asked
	chunks  []mapChunk
	covered block.Chunk
	runs    []wire.Run
}

// mapChunk is what memory knows of a chunk.
type mapChunk struct {
	chunk   block.Chunk
	delta   []extent // a copy
	frozen  []extent
	marked  bool
	gen     block.Generation // of the newest marker, if marked
	written block.Version
}

// Map starts a mapping. Chunks that hold nothing, or nothing newer than a
// range marker, are passed over in memory.
func (r *Replica) Map(q MapQuery) *Mapping {
	m := &Mapping{db: r.db, local: r.local, q: q, applied: r.AppliedVersion(), covered: q.To}
	v := r.volumes[q.Volume]
	if v == nil || v.record.Tombstone {
		return m
	}
	m.volume = v.number
	extents := 0
	for c, ok := v.chunks.next(q.From); ok && c < q.To; c, ok = v.chunks.next(c + 1) {
		if len(m.chunks) == maxMapChunks || extents > maxMapExtents {
			m.covered = c
			break
		}
		last, _ := v.chunks.get(c)
		mc := mapChunk{chunk: c}
		mc.gen, mc.written, mc.marked = v.markers.newest(c, q.Generation)
		if mc.marked && mc.written >= last {
			continue
		}
		if v.delta != nil && v.delta.chunks[c] != nil {
			mc.delta = slices.Clone(v.delta.chunks[c].extents)
			extents += len(mc.delta)
		}
		if v.frozen != nil && v.frozen.chunks[c] != nil {
			mc.frozen = v.frozen.chunks[c].extents
		}
		m.chunks = append(m.chunks, mc)
	}
	if len(m.chunks) > 0 {
		m.snap = r.db.acquire()
	}
	return m
}

// Applied is the index that the mapping is of.
func (m *Mapping) Applied() block.Version { return m.applied }

// Pending tells whether the store has to be asked.
func (m *Mapping) Pending() bool { return m.snap != nil }

// Load asks the store. It blocks and may be called off the Loop, once.
func (m *Mapping) Load() (err error) {
	it, err := m.snap.Iterate(appendExtentPrefix(nil, m.local, m.volume, m.q.From, 0), appendExtentPrefix(nil, m.local, m.volume, m.covered, 0))
	if err != nil {
		return err
	}
	defer func() {
		if cerr := it.Close(); err == nil {
			err = cerr
		}
	}()
	walk := mapWalk{it: it}
	for i := range m.chunks {
		if err := m.resolve(&m.chunks[i], &walk); err != nil {
			return err
		}
		if len(m.runs) >= m.q.Max && i+1 < len(m.chunks) {
			m.covered = m.chunks[i+1].chunk
			break
		}
	}
	return nil
}

// mapSlot is the newest that was found for a block.
type mapSlot struct {
	state   slotState
	gen     block.Generation
	written block.Version
}

const slotMarked = slotData + 1

func (s *mapSlot) offer(gen block.Generation, written block.Version, state slotState) {
	if s.state == slotEmpty || gen > s.gen || gen == s.gen && written > s.written {
		*s = mapSlot{state, gen, written}
	}
}

type mapWalk struct {
	it    Iterator
	valid bool
	crcs  []uint32
}

func (m *Mapping) resolve(mc *mapChunk, w *mapWalk) error {
	var slots [block.BlocksPerChunk]mapSlot
	for _, layer := range [][]extent{mc.delta, mc.frozen} {
		for i := range layer {
			e := &layer[i]
			state := slotData
			if e.zero() {
				state = slotZero
			}
			for b := e.block; e.gen <= m.q.Generation && b < e.block+uint16(e.count); b++ {
				slots[b].offer(e.gen, e.written, state)
			}
		}
	}
	for i := range slots {
		if mc.marked {
			slots[i].offer(mc.gen, mc.written, slotMarked)
		}
	}
	if err := m.stored(mc.chunk, w, slots[:]); err != nil {
		return err
	}
	m.emit(mc.chunk, slots[:])
	return nil
}

// stored offers what the store has of a chunk. Chunks come in ascending order.
func (m *Mapping) stored(c block.Chunk, w *mapWalk, slots []mapSlot) (err error) {
	start := appendExtentPrefix(nil, m.local, m.volume, c, 0)
	if !w.valid || bytes.Compare(w.it.Key(), start) < 0 {
		w.valid = w.it.Seek(start)
	}
	for ; w.valid; w.valid = w.it.Next() {
		k, ok := decodeExtentKey(w.it.Key())
		if !ok {
			return corrupt("extent key", w.it.Key())
		}
		if k.chunk != c {
			break
		}
		var e stored
		if w.crcs, err = decodeExtent(&e, k.block, w.it.Value(), w.crcs[:0]); err != nil {
			return err
		}
		state := slotData
		if e.place.Kind == KindZero {
			state = slotZero
		}
		for b := k.block; k.gen <= m.q.Generation && b < k.block+uint16(e.count); b++ {
			slots[b].offer(k.gen, k.written, state)
		}
	}
	return w.it.Err()
}

func (m *Mapping) emit(c block.Chunk, slots []mapSlot) {
	first := len(m.runs)
	for b := range slots {
		var state block.ExtentState
		switch slots[b].state {
		case slotData:
			state = block.Data
		case slotZero:
			state = block.Zero
		default:
			continue
		}
		if n := len(m.runs); n > first && m.runs[n-1].State == state && int(m.runs[n-1].Block)+int(m.runs[n-1].Count) == b {
			m.runs[n-1].Count++
			continue
		}
		m.runs = append(m.runs, wire.Run{Chunk: c, Block: block.Index(b), Count: 1, State: state})
	}
}

// Runs returns the runs of data and of zero extents, in order. What is not in
// them, below Covered, is a hole; range markers count as holes. A pending
// mapping must be loaded first.
func (m *Mapping) Runs() []wire.Run { return m.runs }

// Covered is the chunk at which to go on; To when nothing is left.
func (m *Mapping) Covered() block.Chunk { return m.covered }

// Release ends the use, on the Loop. Load must not be running.
func (m *Mapping) Release() {
	if m.snap != nil {
		m.db.release(m.snap)
		m.snap = nil
	}
}
