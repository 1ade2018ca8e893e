package index

import (
	"slices"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// copyChunk is a chunk that a Copy has in work.
type copyChunk struct {
	wanted
	volume  *copyVolume
	extents []copyExtent
	crcs    []uint32
	record  chunkRecord
}

// copyExtent is an extent of the view.
type copyExtent struct {
	found
	live uint16 // its blocks that a view sees, relative to it
	need uint16 // those that have to come from the sender
	at   []seglog.Location
}

// Need is a run of blocks whose data has to come from the sender.
type Need struct {
	// Key names the sender's extent; the run begins Skip blocks into it.
	Key  []byte
	Skip uint8
	// Record says what the run is; one CRC per block.
	Record seglog.Record

	extent *copyExtent
}

// Next returns up to count chunks to go on with, of which Extents must be
// called for those that drop is false for. None are left when it returns none.
func (c *Copy) Next(count int) (ids []ChunkID) {
	c.chunks, c.needs = nil, nil
	for len(c.chunks) < count && c.next < len(c.want) {
		w := c.want[c.next]
		c.want[c.next].record = nil
		c.next++
		k := &copyChunk{wanted: w, volume: c.volumes[w.id.Volume]}
		c.chunks = append(c.chunks, k)
		if w.record != nil {
			k.record, _ = decodeChunk(w.record) // Table did
			ids = append(ids, w.id)
		}
	}
	c.ended = len(c.chunks) == 0
	return ids
}

// Ended tells whether Next found nothing more.
func (c *Copy) Ended() bool { return c.ended }

// maxChunkRecords bounds the extents of a chunk that a sender may claim: all
// blocks alone, in 64 generations.
const maxChunkRecords = 64 * block.BlocksPerChunk

// Extents takes records of a chunk's extents, in order. Kind Corrupt.
func (c *Copy) Extents(id ChunkID, recs []Record) error {
	for _, k := range c.chunks {
		if k.id != id {
			continue
		}
		if len(k.extents)+len(recs) > maxChunkRecords {
			return block.Errorf(block.Corrupt, "chunk %d of volume %d has more than %d extents", id.Chunk, id.Volume, maxChunkRecords)
		}
		for _, rec := range recs {
			if err := k.take(rec); err != nil {
				return err
			}
		}
		return nil
	}
	return block.Errorf(block.Internal, "index: extents of chunk %v, which nobody asked for", id)
}

// take decodes a record of an extent.
func (k *copyChunk) take(rec Record) (err error) {
	e := copyExtent{}
	var ok bool
	e.key, ok = decodeExtentKey(appendLocal(nil, 0, rec.Key))
	if !ok || e.key.volume != k.id.Volume || e.key.chunk != k.id.Chunk {
		return corrupt("extent key", rec.Key)
	}
	if n := len(k.extents); n > 0 {
		if last := &k.extents[n-1].key; e.key.block < last.block || e.key == *last {
			return corrupt("extent key", rec.Key)
		}
	}
	if k.crcs, err = decodeExtent(&e.stored, e.key.block, rec.Value, k.crcs); err != nil {
		return err
	}
	if e.place.Kind == KindLocal && e.place.Framed {
		return block.Errorf(block.Unsupported, "chunk %d of volume %d has an extent with codec %d, which this build does not copy", k.id.Chunk, k.id.Volume, e.place.Codec)
	}
	k.extents = append(k.extents, e)
	return nil
}

// Compare returns the job that finds out what of the chunks' data the replica
// holds already.
func (c *Copy) Compare() *Job {
	m := newMerger(c.r)
	return &Job{
		run: func() (err error) {
			if err := m.open(); err != nil {
				return err
			}
			for _, k := range c.chunks {
				if err = m.resolveCopy(k, compareCell); err != nil {
					break
				}
			}
			if cerr := m.it.Close(); err == nil {
				err = cerr
			}
			return err
		},
		finish: func() {
			for _, k := range c.chunks {
				for i := range k.extents {
					c.need(k, &k.extents[i])
				}
			}
			c.r.endJob(m)
		},
		failed: func() { c.r.endJob(m) },
	}
}

// need notes the runs of e that are to be fetched.
func (c *Copy) need(k *copyChunk, e *copyExtent) {
	runs(e.need, func(from, n uint8) {
		c.needs = append(c.needs, Need{
			Key: appendExtentKey(nil, 0, e.key)[headLen-1:], Skip: from, extent: e,
			Record: seglog.Record{Key: c.r.key, Volume: k.volume.in.record.Volume, Chunk: k.id.Chunk, Block: block.Index(e.key.block + uint16(from)),
				Generation: e.key.gen, Written: e.key.written, CRCs: e.crcs[from : from+n]},
		})
	})
}

// Needs are the runs whose data has to come from the sender, after Compare.
func (c *Copy) Needs() []Need { return c.needs }

// Placed says that the blocks of a run are on this disk, durably, from at on.
// They are held until Replace has ended, or Abandon.
func (c *Copy) Placed(n *Need, skip uint8, count int, at seglog.Location) {
	if n.extent.at == nil {
		n.extent.at = make([]seglog.Location, n.extent.count)
	}
	for i := range count {
		n.extent.at[int(n.Skip)+int(skip)+i] = seglog.Location{Segment: at.Segment, Block: at.Block + uint16(i)}
	}
	c.r.db.live.keep(at.Segment, count)
}

// Abandon lets go of what was placed for chunks that will not be replaced. The
// copy is not used any more; no job of it may be in flight.
func (c *Copy) Abandon() {
	c.letGo()
	c.chunks, c.needs = nil, nil
}

func (c *Copy) letGo() {
	for _, k := range c.chunks {
		for i := range k.extents {
			for _, at := range k.extents[i].at {
				if at.Segment != 0 {
					c.r.db.live.keep(at.Segment, -1)
				}
			}
			k.extents[i].at = nil
		}
	}
}

// Replace returns the job that puts the chunks in the place of the replica's
// own. All that Needs named must have been Placed.
func (c *Copy) Replace() *Job {
	r := c.r
	m := newMerger(r)
	m.batch = m.store.NewBatch()
	m.changes = make([]int, len(c.order))
	before := make([]int64, len(c.order))
	for i, cv := range c.order {
		before[i] = cv.v.storeBlocks
	}
	after := slices.Clone(before)
	var dead []liveEdit
	return &Job{
		run: func() (err error) {
			if err := m.open(); err != nil {
				return err
			}
			for _, k := range c.chunks {
				m.volume, _ = slices.BinarySearchFunc(c.order, k.id.Volume, func(v *copyVolume, n uint32) int { return int(int64(v.in.number) - int64(n)) })
				if err = m.replaceChunk(k); err != nil {
					break
				}
			}
			if cerr := m.it.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				return err
			}
			if dead, err = m.saveLive(); err != nil {
				return err
			}
			for i, cv := range c.order {
				after[i] = max(0, before[i]+int64(m.changes[i]))
				m.saveUsage(cv.in.number, before[i], after[i])
			}
			return m.store.Commit(m.batch)
		},
		finish: func() {
			for _, e := range m.set {
				r.db.live.set(e.segment, e.at, e.mask)
			}
			for i, cv := range c.order {
				cv.v.storeBlocks = after[i]
			}
			for _, k := range c.chunks {
				k.volume.v.chunks.remove(k.id.Chunk)
				if k.wanted.record == nil {
					continue
				}
				k.volume.v.chunks.set(k.id.Chunk, k.record.version)
				if !k.record.plain() {
					k.volume.v.chunks.markExtras(k.id.Chunk)
				}
			}
			c.letGo()
			c.chunks, c.needs = nil, nil
			r.settleJob(m, dead, r.committed)
		},
	}
}

// endJob ends a job that did not change the store.
func (r *Replica) endJob(m *merger) {
	r.db.release(m.snap)
	r.busy = false
	r.resumeMoves()
}

// resolveCopy decides, cell by cell, what of the view's extents is seen, and
// calls each with the cell's: those of the view, and the own ones in m.found,
// whose live blocks (relative to the extent) are in own.
func (m *merger) resolveCopy(k *copyChunk, each func(m *merger, base uint16, in []copyExtent, own []uint16) error) error {
	for base, i := uint16(0), 0; base < block.BlocksPerChunk; base += cellBlocks {
		from := i
		for i < len(k.extents) && k.extents[i].key.block < base+cellBlocks {
			i++
		}
		in := k.extents[from:i]
		m.cell.reset()
		m.cell.addMarkers(k.volume.union, k.id.Chunk)
		for j := range in {
			e := &in[j]
			m.cell.add(candidate{gen: e.key.gen, written: e.key.written, layer: layerStore, from: uint8(e.key.block - base), count: e.count, src: j})
		}
		keep := k.volume.in.retention()
		m.cell.resolve(&keep)
		for j := range m.cell.cands {
			if c := &m.cell.cands[j]; c.layer == layerStore {
				in[c.src].live = c.live >> c.from
			}
		}
		own, err := m.ownCell(k, base)
		if err != nil {
			return err
		}
		if err := each(m, base, in, own); err != nil {
			return err
		}
	}
	return nil
}

// ownCell reads the replica's own extents of a cell into m.found and returns
// which of their blocks are live.
func (m *merger) ownCell(k *copyChunk, base uint16) ([]uint16, error) {
	m.found, m.crcs = m.found[:0], m.crcs[:0]
	if k.volume.v == nil {
		return nil, nil
	}
	if err := m.readCell(k.id.Volume, k.id.Chunk, base); err != nil || len(m.found) == 0 {
		return nil, err
	}
	m.cell.reset()
	m.cell.addMarkers(k.volume.v.saved, k.id.Chunk)
	for j := range m.found {
		e := &m.found[j]
		m.cell.add(candidate{gen: e.key.gen, written: e.key.written, layer: layerStore, from: uint8(e.key.block - base), count: e.count, src: j})
	}
	keep := k.volume.v.retention()
	m.cell.resolve(&keep)
	own := make([]uint16, len(m.found))
	for j := range m.cell.cands {
		if c := &m.cell.cands[j]; c.layer == layerStore {
			own[c.src] = c.live >> c.from
		}
	}
	return own, nil
}

// ownPlace finds the bytes of block b of the view's extent among the own ones.
func (m *merger) ownPlace(e *copyExtent, b uint8, own []uint16) (seglog.Location, bool) {
	at := e.key.block + uint16(b)
	for j := range m.found {
		o := &m.found[j]
		if o.key.gen != e.key.gen || o.key.written != e.key.written || o.place.Kind != KindLocal || o.place.Framed ||
			at < o.key.block || at >= o.key.block+uint16(o.count) {
			continue
		}
		if i := at - o.key.block; own[j]&(1<<i) != 0 && o.crcs[i] == e.crcs[b] {
			return o.place.forward(i).At, true
		}
	}
	return seglog.Location{}, false
}

// compareCell finds what has to be fetched of a cell.
func compareCell(m *merger, _ uint16, in []copyExtent, own []uint16) error {
	for i := range in {
		e := &in[i]
		if e.place.Kind != KindLocal {
			continue
		}
		for b := range e.count {
			if e.live&(1<<b) == 0 {
				continue
			}
			if _, held := m.ownPlace(e, b, own); !held {
				e.need |= 1 << b
			}
		}
	}
	return nil
}

// replaceChunk removes the own extents of a chunk and writes those of the view.
func (m *merger) replaceChunk(k *copyChunk) error {
	key := appendChunkKey(nil, m.local, k.id.Volume, k.id.Chunk)
	if k.wanted.record == nil {
		m.batch.Delete(key)
	} else {
		m.batch.Set(key, k.wanted.record)
	}
	return m.resolveCopy(k, func(m *merger, base uint16, in []copyExtent, own []uint16) error {
		for j := range m.found {
			o := &m.found[j]
			if o.place.Kind == KindLocal && !o.place.Framed {
				m.kill(o.place.At, 1<<o.count-1)
			}
			m.batch.Delete(appendExtentKey(m.key[:0], m.local, o.key))
		}
		for i := range in {
			if err := m.putCopy(&in[i], own); err != nil {
				return err
			}
		}
		return nil
	})
}

// putCopy writes what is seen of an extent of the view, in runs that lie
// together on this disk.
func (m *merger) putCopy(e *copyExtent, own []uint16) error {
	var err error
	runs(e.live, func(from, n uint8) {
		for n > 0 && err == nil {
			part := e.part(from, n)
			if e.place.Kind == KindLocal {
				if part, err = m.placeCopy(e, from, n, own); err != nil {
					return
				}
				m.set = append(m.set, liveEdit{part.place.At.Segment, part.place.At.Block, 1<<part.count - 1, m.volume})
			}
			key := e.key
			key.block += uint16(from)
			m.put(key, &part)
			from, n = from+part.count, n-part.count
		}
	})
	return err
}

// placeCopy returns the first blocks of [from, from+n) that lie together.
func (m *merger) placeCopy(e *copyExtent, from, n uint8, own []uint16) (part stored, err error) {
	for b := from; b < from+n; b++ {
		var at seglog.Location
		if e.at != nil {
			at = e.at[b]
		}
		if at.Segment == 0 {
			var ok bool
			if at, ok = m.ownPlace(e, b, own); !ok {
				return part, block.Errorf(block.Internal, "index: block %d of chunk %d, written by %v, was not fetched", e.key.block+uint16(b), e.key.chunk, e.key.written)
			}
		}
		if b == from {
			part.place = Place{Kind: KindLocal, At: at}
		} else if part.place.forward(uint16(b-from)) != (Place{Kind: KindLocal, At: at}) {
			break
		}
		part.count++
	}
	part.crcs = e.crcs[from : from+part.count]
	return part, nil
}
