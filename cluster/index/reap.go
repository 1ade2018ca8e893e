package index

import (
	"bytes"

	"firn.io/firn/internal/block"
)

// reapCursor says how far the reaper came with which marker.
type reapCursor struct {
	gen  block.Generation
	span span
	next block.Chunk
}

// reapSpans bounds the markers of one job of the reaper: memory forgets them
// within one turn of the Loop.
const reapSpans = 512

// reaping is one step of the reaper: a part of one marker's range.
type reaping struct {
	volume  *volume // for Finish; Run reads only number
	number  uint32
	gen     block.Generation
	span    span
	from    block.Chunk
	budget  int
	markers *markers
	keep    retention
	blocks  int64
	scanned block.Chunk          // below it everything is done
	kept    map[block.Chunk]bool // chunks that still have extents in the store
	named   bool                 // a record names cold objects: the marker stays (T2)
}

// StartReap returns a job that removes up to about extents records that range
// markers or deletions hide, and in time the markers themselves (S3). Nil if
// there is nothing to reap, if a job of this replica is in flight, or if the
// markers are not in a checkpoint yet.
func (r *Replica) StartReap(extents int) *Job {
	if r.busy || r.removed || r.spans == 0 || r.installing != nil {
		return nil
	}
	steps := r.nextReaping()
	if len(steps) == 0 {
		return nil
	}
	m := newMerger(r)
	var out mergeResult
	return &Job{
		run: func() (err error) {
			out, err = m.reap(steps, max(extents, 1))
			return err
		},
		finish: func() { r.finishReap(steps, m, out) },
	}
}

// nextReaping picks the first markers of a layer that the store's checkpoint has.
func (r *Replica) nextReaping() (steps []*reaping) {
	merged := block.MakeVersion(r.group.era, r.committed)
	for _, v := range r.order {
		for i := range v.markers.layers {
			l := &v.markers.layers[i]
			for _, s := range l.spans {
				if s.written > merged {
					continue
				}
				if len(steps) == reapSpans {
					return steps
				}
				from := s.from
				if c := &v.reapCursor; c.gen == l.gen && c.span.written == s.written && c.next >= s.from && c.next < s.to {
					from = c.next
				}
				if len(steps) > 0 {
					steps = append(steps, steps[0].next(s, from))
					continue
				}
				keep := v.retention()
				keep.list = append([]block.Generation(nil), keep.list...)
				steps = append(steps, &reaping{volume: v, number: v.number, gen: l.gen, span: s, from: from,
					markers: v.saved, keep: keep, blocks: v.storeBlocks})
			}
			if len(steps) > 0 {
				return steps
			}
		}
	}
	return nil
}

// next is a step of the same job over another marker of the layer.
func (s *reaping) next(marker span, from block.Chunk) *reaping {
	other := *s
	other.span, other.from = marker, from
	return &other
}

// reap takes steps until it has used up its budget. A step that it did not come
// to has scanned nothing.
func (m *merger) reap(steps []*reaping, budget int) (out mergeResult, err error) {
	first := steps[0]
	m.batch = m.store.NewBatch()
	m.changes = make([]int, 1)
	if err := m.open(); err != nil {
		return out, err
	}
	for _, s := range steps {
		s.budget = budget
		if err = m.reapExtents(s); err == nil {
			err = m.reapRecords(s)
		}
		if budget = s.budget; err != nil || budget <= 0 {
			break
		}
	}
	if cerr := m.it.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return out, err
	}
	if out.dead, err = m.saveLive(); err != nil {
		return out, err
	}
	out.blocks = []int64{max(0, first.blocks+int64(m.changes[0]))}
	m.saveUsage(first.number, first.blocks, out.blocks[0])
	return out, m.store.Commit(m.batch)
}

// reapExtents removes the extents of [from, to) that no view sees, whole
// chunks at a time, until the budget is used.
func (m *merger) reapExtents(s *reaping) error {
	end := appendExtentPrefix(nil, m.local, s.number, s.span.to, 0)
	m.valid = m.it.Seek(appendExtentPrefix(nil, m.local, s.number, s.from, 0))
	var gone deadRange
	for m.valid && bytes.Compare(m.it.Key(), end) < 0 {
		k, ok := decodeExtentKey(m.it.Key())
		if !ok {
			return corrupt("extent key", m.it.Key())
		}
		if s.budget <= 0 && k.chunk != s.scanned {
			s.scanned = k.chunk
			gone.write(m.batch)
			return nil
		}
		s.scanned = k.chunk
		base := k.block &^ (cellBlocks - 1)
		if err := m.readCell(s.number, k.chunk, base); err != nil {
			return err
		}
		s.budget -= len(m.found)
		m.reapCell(s, k.chunk, base, &gone)
	}
	gone.write(m.batch)
	s.scanned = s.span.to
	return m.it.Err()
}

// reapCell decides a cell of which all stored extents are in m.found.
func (m *merger) reapCell(s *reaping, c block.Chunk, base uint16, gone *deadRange) {
	m.cell.reset()
	m.cell.addMarkers(s.markers, c)
	for j := range m.found {
		e := &m.found[j]
		m.cell.add(candidate{gen: e.key.gen, written: e.key.written, layer: layerStore, from: uint8(e.key.block - base), count: e.count, src: j})
	}
	m.cell.resolve(&s.keep)
	alive := false
	for i := range m.cell.cands {
		k := &m.cell.cands[i]
		alive = alive || k.layer == layerStore && k.live != 0
	}
	if !alive {
		for i := range m.found {
			e := &m.found[i]
			if e.place.Kind == KindLocal && !e.place.Framed {
				m.kill(e.place.At, 1<<e.count-1)
			}
			m.key = appendExtentKey(m.key[:0], m.local, e.key)
			gone.add(m.key)
		}
		return
	}
	gone.write(m.batch)
	if s.kept == nil {
		s.kept = make(map[block.Chunk]bool)
	}
	s.kept[c] = true
	m.rewriteStored(base)
	m.leaveZeros(s, c, base)
}

// leaveZeros writes zero extents where an older generation's data would show
// through once the marker is forgotten.
func (m *merger) leaveZeros(s *reaping, c block.Chunk, base uint16) {
	var older uint16
	for i := len(m.cell.cands) - 1; i >= 0; i-- {
		k := &m.cell.cands[i]
		if k.layer != layerMarker {
			older |= k.live
			continue
		}
		if k.gen != s.gen || k.written != s.span.written {
			continue
		}
		runs(k.live&older, func(from, n uint8) {
			m.put(extentKey{s.number, c, base + uint16(from), s.gen, s.span.written}, &stored{count: n, place: Place{Kind: KindZero}})
		})
	}
}

// reapRecords removes the records of chunks that have nothing left and raises
// the others to the marker.
func (m *merger) reapRecords(s *reaping) error {
	from := appendChunkKey(nil, m.local, s.number, s.from)
	to := appendChunkKey(nil, m.local, s.number, s.scanned)
	return scan(m.snap, from, to, func(key, value []byte) error {
		_, c, ok := decodeChunkKey(key)
		rec, err := decodeChunk(value)
		switch {
		case !ok || err != nil:
			return corrupt("chunk record", value)
		case rec.version > s.span.written:
		case len(rec.objects) > 0:
			s.named = true
		case s.kept[c]:
			rec.version = s.span.written
			rec.changed = max(rec.changed, rec.version)
			m.value = appendChunk(m.value[:0], &rec)
			m.batch.Set(key, m.value)
		default:
			m.batch.Delete(key)
		}
		return nil
	})
}

// finishReap brings memory up to the steps, and forgets the markers whose
// range is done. What was moved into the delta before the step, and is hidden,
// goes with its original: nothing would hide it later. The marker's record and the floor version are saved
// by the next checkpoint; until then a restart finds it again.
func (r *Replica) finishReap(steps []*reaping, m *merger, out mergeResult) {
	steps[0].volume.storeBlocks = out.blocks[0]
	for _, s := range steps {
		if s.scanned > s.from {
			r.finishStep(s)
		}
	}
	r.settleJob(m, out.dead, r.committed)
}

func (r *Replica) finishStep(s *reaping) {
	v := s.volume
	for c, ok := v.chunks.next(s.from); ok && c < s.scanned; c, ok = v.chunks.next(c + 1) {
		at, _ := v.chunks.get(c)
		r.dropHidden(v, c, s)
		switch {
		case at > s.span.written, v.chunks.hasExtras(c):
		case s.kept[c], v.delta != nil && v.delta.chunks[c] != nil:
			v.chunks.set(c, s.span.written)
		default:
			v.chunks.remove(c)
		}
	}
	v.reapCursor = reapCursor{gen: s.gen, span: s.span, next: s.scanned}
	if s.scanned == s.span.to && !s.named {
		r.ownMarkers(v)
		before := v.markers.count()
		v.markers.remove(s.gen, s.span)
		r.spans += v.markers.count() - before
		v.floorVersion = max(v.floorVersion, s.span.written)
		r.soil(v)
	}
}

func (r *Replica) dropHidden(v *volume, c block.Chunk, s *reaping) {
	if v.delta == nil || v.delta.chunks[c] == nil {
		return
	}
	v.delta.chunks[c].drop(func(e *extent) bool {
		return e.gen <= s.gen && e.written < s.span.written && !s.keep.needs(e.gen, s.gen)
	}, func(e *extent, mask uint16) {
		v.delta.blocks -= int64(r.db.live.clear(e.segment, e.at, mask))
	})
}

// deadRange gathers neighbouring keys to delete them at once.
type deadRange struct {
	first, last []byte
	count       int
}

func (d *deadRange) add(key []byte) {
	if d.count == 0 {
		d.first = append(d.first[:0], key...)
	}
	d.last = append(d.last[:0], key...)
	d.count++
}

// write deletes the keys gathered. No other keys are between them.
func (d *deadRange) write(b Batch) {
	switch d.count {
	case 0:
	case 1:
		b.Delete(d.first)
	default:
		d.last = append(d.last, 0)
		b.DeleteRange(d.first, d.last)
	}
	d.count = 0
}

// StartRemove forgets a replica at once and returns the job that removes it
// from the store. Its blocks are released by the next flush. Nil if the replica
// is not here or a job of it is in flight.
func (db *DB) StartRemove(r *Replica) *Job {
	if r.busy || r.removed {
		return nil
	}
	r.removed = true
	delete(db.replicas, r.key)
	m := newMerger(r)
	return &Job{
		run: func() error {
			m.batch = m.store.NewBatch()
			m.batch.Delete(appendCatalogKey(nil, r.key))
			m.batch.DeleteRange(appendHead(nil, m.local, 0), appendHead(nil, m.local+1, 0))
			err := scan(m.snap, appendHead(nil, m.local, kindLive), appendHead(nil, m.local, kindLive+1), func(key, value []byte) error {
				s, _, ok := decodeLiveKey(key)
				b, err := decodeBitmap(value)
				if !ok || err != nil {
					return corrupt("live bits", value)
				}
				m.killAll(s, b)
				return nil
			})
			if err != nil {
				return err
			}
			return m.store.Commit(m.batch)
		},
		finish: func() {
			for _, v := range r.order {
				if v.delta == nil {
					continue
				}
				for _, d := range v.delta.chunks {
					for i := range d.extents {
						if e := &d.extents[i]; !e.zero() {
							db.live.clear(e.segment, e.at, e.live)
						}
					}
				}
			}
			r.settleJob(m, m.dead, 0)
		},
	}
}
