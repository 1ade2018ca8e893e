package index

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// StartCheckpoint freezes the state at Applied and returns the job that merges
// it into the store. It is durable once a flush that was started after Finish
// is finished. Nil if nothing was applied since the last one, or if a job of
// this replica is in flight.
func (r *Replica) StartCheckpoint() *Job {
	if r.busy || r.removed || r.catalog && r.entries == 0 && r.updates == 0 && len(r.dirty) == 0 {
		return nil
	}
	f := r.freeze()
	m := newMerger(r)
	var out mergeResult
	return &Job{
		run: func() (err error) {
			out, err = m.checkpoint(f)
			return err
		},
		finish: func() { r.finishCheckpoint(f, m, out) },
	}
}

// frozen is the state of a replica at one applied index. It does not change.
type frozen struct {
	applied uint64
	group   []byte
	catalog bool // the store has to learn of the replica
	volumes []frozenVolume
}

type frozenVolume struct {
	volume   *volume // its identity, for Finish; Run reads only number and id
	number   uint32
	id       block.VolumeID
	record   []byte // nil if it did not change
	value    []byte
	setValue bool
	was, now *markers
	keep     retention
	delta    *volumeDelta // may be nil
	blocks   int64        // live blocks in the store before
}

func (r *Replica) freeze() *frozen {
	f := &frozen{applied: r.group.applied, group: appendGroup(nil, &r.group), catalog: !r.catalog}
	changed := slices.Clone(r.touched)
	for _, v := range r.dirty {
		if v.delta == nil {
			changed = append(changed, v)
		}
	}
	slices.SortFunc(changed, func(a, b *volume) int { return int(int64(a.number) - int64(b.number)) })
	for _, v := range changed {
		fv := frozenVolume{volume: v, number: v.number, id: v.record.Volume, was: v.saved, now: v.markers,
			keep: v.retention(), delta: v.delta, blocks: v.storeBlocks}
		fv.keep.list = slices.Clone(fv.keep.list)
		if v.dirty {
			fv.record = appendVolume(nil, v, v.floorVersion)
		}
		if v.valueDirty {
			fv.value, fv.setValue = v.record.VolumeValue, true
		}
		v.dirty, v.valueDirty = false, false
		v.sharing = true
		v.frozen, v.delta = v.delta, nil
		f.volumes = append(f.volumes, fv)
	}
	r.frozenBytes, r.bytes = r.bytes, 0
	r.updates, r.entries = 0, 0
	r.touched, r.dirty = nil, nil
	return f
}

func (r *Replica) finishCheckpoint(f *frozen, m *merger, out mergeResult) {
	for i := range f.volumes {
		fv := &f.volumes[i]
		fv.volume.frozen = nil
		fv.volume.saved = fv.now
		fv.volume.storeBlocks = out.blocks[i]
	}
	r.frozenBytes = 0
	r.catalog = true
	r.committed = f.applied
	r.settleJob(m, out.dead, f.applied)
}

// settleJob ends a job: what it found dead is not live any more but held until
// a flush, and moves that waited are judged.
func (r *Replica) settleJob(m *merger, dead []liveEdit, applied uint64) {
	db := r.db
	held := make(holds)
	for _, e := range dead {
		if n := db.live.clear(e.segment, e.at, e.mask); n > 0 {
			held[e.segment] += n
		}
	}
	db.live.hold(held)
	db.merged = append(db.merged, &merged{replica: r, applied: applied, dead: held})
	db.release(m.snap)
	db.refresh()
	r.busy = false
	r.resumeMoves()
}

// liveEdit sets or clears live bits of a segment.
type liveEdit struct {
	segment seglog.SegmentID
	at      uint16
	mask    uint16 // relative to at
	volume  int    // whose usage it changes
}

// merger works on the store for one replica, off the Loop. It shares nothing
// with the Loop but the snapshot and frozen state.
type merger struct {
	store      Store
	snap       *sharedSnapshot
	replica    seglog.ReplicaKey
	local      localID
	generation func(seglog.SegmentID) uint64

	batch Batch
	it    Iterator
	valid bool // the iterator is on a key

	cell    cell
	found   []found // extents of the store in the cell
	crcs    []uint32
	key     []byte
	value   []byte
	set     []liveEdit
	dead    []liveEdit
	volume  int   // index of the volume in work
	changes []int // of live blocks, by volume
	objects bool  // a chunk record in work names cold objects
}

// found is an extent of the store.
type found struct {
	key extentKey
	stored
}

type mergeResult struct {
	blocks []int64 // of the frozen volumes, afterwards
	dead   []liveEdit
}

func newMerger(r *Replica) *merger {
	r.busy = true
	m := &merger{store: r.db.store, snap: r.db.acquire(), replica: r.key, local: r.local}
	m.generation = r.db.generations()
	return m
}

// generations freezes what SegmentGeneration says of the segments with live
// blocks, since it must be asked on the Loop.
func (db *DB) generations() func(seglog.SegmentID) uint64 {
	if db.opts.SegmentGeneration == nil {
		return func(seglog.SegmentID) uint64 { return 0 }
	}
	now := make(map[seglog.SegmentID]uint64, len(db.live.segments))
	for s := range db.live.segments {
		now[s] = db.opts.SegmentGeneration(s)
	}
	return func(s seglog.SegmentID) uint64 { return now[s] }
}

// checkpoint merges the frozen state in key order and commits it.
func (m *merger) checkpoint(f *frozen) (out mergeResult, err error) {
	m.batch = m.store.NewBatch()
	m.changes = make([]int, len(f.volumes))
	if err := m.open(); err != nil {
		return out, err
	}
	for i := range f.volumes {
		m.volume = i
		if err = m.mergeVolume(&f.volumes[i]); err != nil {
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
	out.blocks = make([]int64, len(f.volumes))
	for i := range f.volumes {
		fv := &f.volumes[i]
		out.blocks[i] = max(0, fv.blocks+int64(m.changes[i]))
		m.saveUsage(fv.number, fv.blocks, out.blocks[i])
	}
	m.batch.Set(appendHead(nil, m.local, kindGroup), f.group)
	if f.catalog {
		m.batch.Set(appendCatalogKey(nil, m.replica), binary.LittleEndian.AppendUint32(nil, uint32(m.local)))
	}
	return out, m.store.Commit(m.batch)
}

func (m *merger) open() (err error) {
	m.it, err = m.snap.Iterate(appendHead(nil, m.local, kindExtent), appendHead(nil, m.local, kindExtent+1))
	return err
}

func (m *merger) saveUsage(volume uint32, was, now int64) {
	if was != now {
		m.batch.Set(appendUsageKey(m.key[:0], m.local, volume), appendUsage(m.value[:0], now))
	}
}

func (m *merger) mergeVolume(fv *frozenVolume) error {
	if fv.record != nil {
		m.batch.Set(appendVolumeKey(m.key[:0], m.local, kindVolume, fv.id), fv.record)
	}
	switch {
	case !fv.setValue:
	case len(fv.value) == 0:
		m.batch.Delete(appendVolumeKey(m.key[:0], m.local, kindValue, fv.id))
	default:
		m.batch.Set(appendVolumeKey(m.key[:0], m.local, kindValue, fv.id), fv.value)
	}
	diffMarkers(fv.was, fv.now, func(g block.Generation, s span) {
		m.batch.Delete(appendMarkerKey(m.key[:0], m.local, fv.number, g, s))
	}, func(g block.Generation, s span) {
		m.batch.Set(appendMarkerKey(m.key[:0], m.local, fv.number, g, s), appendVersion(m.value[:0], s.written))
	})
	if fv.delta == nil {
		return nil
	}
	for _, c := range slices.Sorted(maps.Keys(fv.delta.chunks)) {
		d := fv.delta.chunks[c]
		if err := m.mergeChunk(fv, c, d); err != nil {
			return err
		}
		if d.version != 0 {
			if err := m.saveChunk(fv.number, c, d.version, d.extras); err != nil {
				return err
			}
		}
	}
	return nil
}

// saveChunk writes a chunk's record, keeping what else a stored one holds.
func (m *merger) saveChunk(volume uint32, c block.Chunk, v block.Version, extras bool) error {
	rec := chunkRecord{version: v, changed: v}
	m.key = appendChunkKey(m.key[:0], m.local, volume, c)
	if extras {
		old, ok, err := m.snap.Get(nil, m.key)
		if err != nil {
			return err
		}
		if ok {
			if rec, err = decodeChunk(old); err != nil {
				return err
			}
			rec.version = v
			rec.changed = max(rec.changed, v)
		}
	}
	m.value = appendChunk(m.value[:0], &rec)
	m.batch.Set(m.key, m.value)
	return nil
}

func (m *merger) mergeChunk(fv *frozenVolume, c block.Chunk, d *chunkDelta) error {
	for i := 0; i < len(d.extents); {
		base := d.extents[i].block &^ (cellBlocks - 1)
		end := i
		for end < len(d.extents) && d.extents[end].block < base+cellBlocks {
			end++
		}
		if err := m.readCell(fv.number, c, base); err != nil {
			return err
		}
		m.cell.reset()
		m.cell.addMarkers(fv.now, c)
		for j := i; j < end; j++ {
			m.cell.addExtent(&d.extents[j], layerFrozen, base, j)
		}
		for j := range m.found {
			e := &m.found[j]
			m.cell.add(candidate{gen: e.key.gen, written: e.key.written, layer: layerStore, from: uint8(e.key.block - base), count: e.count, src: j})
		}
		m.cell.resolve(&fv.keep)
		m.rewriteStored(base)
		for j := range m.cell.cands {
			if k := &m.cell.cands[j]; k.layer == layerFrozen {
				m.writeFrozen(fv.number, c, base, d, k)
			}
		}
		i = end
	}
	return nil
}

// readCell reads the store's extents of a cell. Cells come in ascending order.
func (m *merger) readCell(volume uint32, c block.Chunk, base uint16) error {
	m.found, m.crcs = m.found[:0], m.crcs[:0]
	m.key = appendExtentPrefix(m.key[:0], m.local, volume, c, base)
	const near = 4 // steps that are cheaper than a seek
	steps := 0
	for m.valid && bytes.Compare(m.it.Key(), m.key) < 0 && steps < near {
		m.valid = m.it.Next()
		steps++
	}
	if !m.valid || bytes.Compare(m.it.Key(), m.key) < 0 {
		m.valid = m.it.Seek(m.key)
	}
	for ; m.valid; m.valid = m.it.Next() {
		k, ok := decodeExtentKey(m.it.Key())
		if !ok {
			return corrupt("extent key", m.it.Key())
		}
		if k.volume != volume || k.chunk != c || k.block >= base+cellBlocks {
			break
		}
		if err := m.take(k); err != nil {
			return err
		}
	}
	return m.it.Err()
}

// take decodes the extent that the iterator is on.
func (m *merger) take(k extentKey) (err error) {
	e := found{key: k}
	if m.crcs, err = decodeExtent(&e.stored, k.block, m.it.Value(), m.crcs); err != nil {
		return err
	}
	m.found = append(m.found, e)
	return nil
}

// rewriteStored removes the store's extents that died. One that died in parts
// stays as it is while stored extents alone tell so; else what is left of it
// gets keys of its own, so that no two extents of the store name the same bytes
// and none comes back when a marker is forgotten.
func (m *merger) rewriteStored(base uint16) {
	for i := range m.cell.cands {
		k := &m.cell.cands[i]
		if k.layer != layerStore {
			continue
		}
		e := &m.found[k.src]
		if e.place.Kind == KindLocal && !e.place.Framed {
			m.kill(e.place.At, (k.cover&^k.live)>>k.from)
		}
		if k.live == k.cover || k.live != 0 && k.live == k.plain && !k.tied {
			continue
		}
		m.key = appendExtentKey(m.key[:0], m.local, e.key)
		m.batch.Delete(m.key)
	}
	for i := range m.cell.cands {
		k := &m.cell.cands[i]
		if k.layer != layerStore || k.live == k.cover || k.live == k.plain && !k.tied {
			continue
		}
		e := &m.found[k.src]
		runs(k.live, func(from, n uint8) {
			part := e.part(from-k.from, n)
			key := e.key
			key.block = base + uint16(from)
			m.put(key, &part)
		})
	}
}

func (m *merger) put(k extentKey, e *stored) {
	m.key = appendExtentKey(m.key[:0], m.local, k)
	m.value = appendExtent(m.value[:0], e)
	m.batch.Set(m.key, m.value)
}

// writeFrozen writes what is live of a new extent.
func (m *merger) writeFrozen(volume uint32, c block.Chunk, base uint16, d *chunkDelta, k *candidate) {
	e := &d.extents[k.src]
	live := k.live >> k.from
	if !e.zero() {
		at := seglog.Location{Segment: e.segment, Block: e.at}
		m.kill(at, e.live&^live)
		if live != 0 {
			m.set = append(m.set, liveEdit{e.segment, e.at, live, m.volume})
		}
	}
	runs(live, func(from, n uint8) {
		s := stored{count: n, place: Place{Kind: KindZero}}
		if !e.zero() {
			s.place = Place{Kind: KindLocal, At: seglog.Location{Segment: e.segment, Block: e.at + uint16(from)}}
			s.crcs = d.crcsOf(e)[from : from+n]
		}
		m.put(extentKey{volume, c, e.block + uint16(from), e.gen, e.written}, &s)
	})
}

func (m *merger) kill(at seglog.Location, mask uint16) {
	if mask != 0 {
		m.dead = append(m.dead, liveEdit{at.Segment, at.Block, mask, m.volume})
	}
}

// saveLive brings the replica's saved live bits up to the batch (S9) and
// returns the bits that are dead now. Clearing comes before setting, so that
// what is written again in its old place stays.
func (m *merger) saveLive() ([]liveEdit, error) {
	bySegment := func(a, b liveEdit) int { return int(int64(a.segment) - int64(b.segment)) }
	slices.SortStableFunc(m.dead, bySegment)
	slices.SortStableFunc(m.set, bySegment)
	dead, set := m.dead, m.set
	for len(dead) > 0 || len(set) > 0 {
		var s seglog.SegmentID
		switch {
		case len(set) == 0, len(dead) > 0 && dead[0].segment < set[0].segment:
			s = dead[0].segment
		default:
			s = set[0].segment
		}
		d, w := takeSegment(&dead, s), takeSegment(&set, s)
		if err := m.saveSegment(s, d, w); err != nil {
			return nil, err
		}
	}
	return m.dead, nil
}

// takeSegment takes the edits of segment s off the front of list.
func takeSegment(list *[]liveEdit, s seglog.SegmentID) []liveEdit {
	n := 0
	for n < len(*list) && (*list)[n].segment == s {
		n++
	}
	head := (*list)[:n]
	*list = (*list)[n:]
	return head
}

func (m *merger) saveSegment(s seglog.SegmentID, dead, set []liveEdit) error {
	var b bitmap
	m.key = appendLiveKey(m.key[:0], m.local, s, m.generation(s))
	old, ok, err := m.snap.Get(nil, m.key)
	if err != nil {
		return err
	}
	if ok {
		if b, err = decodeBitmap(old); err != nil {
			return err
		}
	}
	for _, e := range dead {
		m.changes[e.volume] -= b.clear(e.at, e.mask)
	}
	for _, e := range set {
		m.changes[e.volume] += b.set(e.at, e.mask)
	}
	for i := range dead {
		dead[i].mask &^= b.get(dead[i].at, dead[i].mask)
	}
	if b.count() == 0 {
		if ok {
			m.batch.Delete(m.key)
		}
		return nil
	}
	m.value = appendBitmap(m.value[:0], b)
	if !bytes.Equal(m.value, old) {
		m.batch.Set(m.key, m.value)
	}
	return nil
}

// killAll declares all blocks of a bitmap dead.
func (m *merger) killAll(s seglog.SegmentID, b bitmap) {
	for i, w := range b {
		for j := range 4 {
			m.kill(seglog.Location{Segment: s, Block: uint16(i*64 + 16*j)}, uint16(w>>(16*j)))
		}
	}
}
