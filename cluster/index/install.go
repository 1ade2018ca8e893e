package index

import (
	"encoding/binary"
	"slices"

	"firn.io/firn/internal/block"
)

// Installing a copy of another replica's state (C3).
//
// A replica that is behind its group's log takes over the state that another
// one has at S, a chunk at a time, while it serves nothing. What the copy
// starts from is M, the replica's own state when it began, all of it in the
// store. A durable mark, which goes into the store before anything else of the
// copy, says so; it is removed by the same batch that sets applied to S.
//
// In between the store holds some chunks as of S and others as of M. A copy
// that ended early is taken up again from the same M, by a view at the same S
// or a later one: a chunk that was replaced already changed after M, so it
// comes again. What the replica holds then does not travel a second time.

// installing is the mark of a copy that is not complete.
type installing struct {
	base   block.Version // M
	target uint64        // the highest S that chunks were taken from
}

const installBytes = 1 + 8 + 8

func appendInstalling(dst []byte, i *installing) []byte {
	dst = append(dst, recordVersion)
	return appendUint64(appendUint64(dst, uint64(i.base)), i.target)
}

func decodeInstalling(p []byte) (*installing, error) {
	if len(p) != installBytes || p[0] != recordVersion {
		return nil, corrupt("mark of a copy", p)
	}
	i := &installing{base: block.Version(binary.LittleEndian.Uint64(p[1:])), target: binary.LittleEndian.Uint64(p[9:])}
	if i.target > block.MaxRaftIndex || i.target == 0 {
		return nil, corrupt("mark of a copy", p)
	}
	return i, nil
}

// Installing tells whether a copy was begun and is not complete: the replica
// must not be read, and must not take part in its group. target is the index
// that the next view has to reach.
func (r *Replica) Installing() (target uint64, ok bool) {
	if r.installing == nil {
		return 0, false
	}
	return r.installing.target, true
}

// ChunkID names a chunk within a replica, by its volume's number.
type ChunkID struct {
	Volume uint32
	Chunk  block.Chunk
}

// Copy is the receiving side of one view. Its methods are called on the Loop;
// the blocking parts are Jobs. In order:
//
//	Head    for all records of HeadRange, then HeadDone
//	Table   for all records of TableRange, then TableDone
//	Begin   a job
//	Next    gives a few chunks; for each, Extents with all records of its range;
//	        Compare, a job; data for Needs, each Placed; Replace, a job;
//	        until Next gives none
//	Finish  a job; the copy is durable after the next flush
//
// Drained must hold before Begin, Compare, Replace and Finish: what collection
// has moved meanwhile is checkpointed as at other times.
type Copy struct {
	r       *Replica
	base    block.Version
	group   *groupRecord
	volumes map[uint32]*copyVolume
	order   []*copyVolume // by number
	byID    map[block.VolumeID]*copyVolume

	cursor ChunkID // in the own chunk table; below it everything was compared
	want   []wanted
	next   int

	chunks []*copyChunk
	needs  []Need
	ended  bool
}

// copyVolume is a volume of the view.
type copyVolume struct {
	in    *volume // as the view has it; its markers are the view's
	v     *volume // own, nil until Begin if the replica did not know it
	union *markers
	table int // chunks to replace or to drop
}

// wanted is a chunk to replace, or to drop if record is nil.
type wanted struct {
	id     ChunkID
	record []byte
}

// NewCopy returns a Copy from the replica's own state, which is in the store
// whole (Unmerged is false), or from where the mark of an earlier one says.
func (r *Replica) NewCopy() *Copy {
	c := &Copy{r: r, base: block.MakeVersion(r.group.era, r.group.applied), volumes: make(map[uint32]*copyVolume), byID: make(map[block.VolumeID]*copyVolume)}
	if r.installing != nil {
		c.base = r.installing.base
	}
	return c
}

// Drained tells whether nothing of the replica is in memory alone and no job
// of it is in flight.
func (r *Replica) Drained() bool { return !r.busy && !r.removed && len(r.touched) == 0 }

// The ranges of records that a copy asks for.
var (
	headFrom, headTo   = []byte{kindGroup}, []byte{kindChunk}
	tableFrom, tableTo = []byte{kindChunk}, []byte{kindChunk + 1}
)

// HeadRange is the range of the group's and the volumes' records and markers.
func HeadRange() (from, to []byte) { return headFrom, headTo }

// TableRange is that of the chunks' records.
func TableRange() (from, to []byte) { return tableFrom, tableTo }

// Range is that of a chunk's extents.
func (id ChunkID) Range() (from, to []byte) {
	return appendExtentPrefix(nil, 0, id.Volume, id.Chunk, 0)[headLen-1:], appendExtentPrefix(nil, 0, id.Volume, id.Chunk+1, 0)[headLen-1:]
}

// Head takes records of the head. Kinds Corrupt, Unsupported.
func (c *Copy) Head(recs []Record) error {
	for _, rec := range recs {
		if err := c.head(appendLocal(nil, 0, rec.Key), rec.Value); err != nil {
			return err
		}
	}
	return nil
}

func (c *Copy) head(key, value []byte) error {
	if len(key) < headLen {
		return corrupt("key", key)
	}
	switch key[headLen-1] {
	case kindGroup:
		g, err := decodeGroup(value)
		if err != nil || len(key) != headLen || c.group != nil {
			return corrupt("group record", value)
		}
		c.group = &g
		return nil
	case kindVolume:
		id, ok := decodeVolumeKey(key)
		if !ok || c.byID[id] != nil {
			return corrupt("volume key", key)
		}
		v, err := decodeVolume(id, value)
		if err != nil {
			return err
		}
		if v.number == 0 || c.volumes[v.number] != nil {
			return corrupt("volume record", value)
		}
		cv := &copyVolume{in: v}
		c.volumes[v.number], c.byID[id] = cv, cv
		c.order = append(c.order, cv)
		return nil
	case kindValue:
		if id, ok := decodeVolumeKey(key); ok && c.byID[id] != nil {
			c.byID[id].in.record.VolumeValue = slices.Clone(value)
			return nil
		}
	case kindMarker:
		number, g, s, ok := decodeMarkerKey(key)
		written, err := decodeVersion(value)
		if ok && err == nil && c.volumes[number] != nil {
			s.written = written
			return c.volumes[number].in.loadMarker(g, s, key)
		}
	}
	return corrupt("key", key)
}

// loadMarker takes a marker as a store has it.
func (v *volume) loadMarker(g block.Generation, s span, key []byte) error {
	for i := range v.markers.layers {
		l := &v.markers.layers[i]
		if j := len(l.spans); l.gen == g && j > 0 && l.spans[j-1].to > s.from {
			return corrupt("range marker", key)
		}
	}
	v.markers.add(g, s)
	return nil
}

// HeadDone checks the head and returns what it is of: the index and term
// that the replica will have applied, and its members, encoded. Kinds Corrupt,
// Unsupported; Unavailable for a view that is older than what the replica has.
func (c *Copy) HeadDone() (index, term uint64, conf []byte, err error) {
	r, g := c.r, c.group
	if g == nil {
		return 0, 0, nil, block.Errorf(block.Corrupt, "index: a view without a group record")
	}
	target := r.group.applied
	if r.installing != nil {
		target = r.installing.target
	}
	switch {
	case g.feature > FeatureLevel:
		return 0, 0, nil, block.Errorf(block.Unsupported, "group %d is at feature level %d, this build knows %d: run a newer one", r.key.Group, g.feature, FeatureLevel)
	case g.applied < target || g.era < r.group.era:
		return 0, 0, nil, block.Errorf(block.Unavailable, "group %d: a view at %d of era %d, the replica needs one at %d or later", r.key.Group, g.applied, g.era, target)
	case g.era != r.group.era:
		c.base = 0
	}
	slices.SortFunc(c.order, func(a, b *copyVolume) int { return int(int64(a.in.number) - int64(b.in.number)) })
	for _, v := range r.order {
		if cv := c.volumes[v.number]; cv == nil || cv.in.record.Volume != v.record.Volume {
			return 0, 0, nil, block.Errorf(block.Corrupt, "group %d: volume %v has number %d here and not in the view", r.key.Group, v.record.Volume, v.number)
		}
		c.volumes[v.number].v = v
	}
	for _, cv := range c.order {
		if cv.in.number > g.volumes {
			return 0, 0, nil, block.Errorf(block.Corrupt, "volume number %d of %d", cv.in.number, g.volumes)
		}
		own := &markers{}
		if cv.v != nil {
			own = cv.v.markers
		}
		cv.union = own.union(cv.in.markers)
	}
	return g.applied, g.term, g.conf, nil
}

// Table takes records of the chunk table, in order.
func (c *Copy) Table(recs []Record) error {
	for _, r := range recs {
		number, chunk, ok := decodeChunkKey(appendLocal(nil, 0, r.Key))
		rec, err := decodeChunk(r.Value)
		id := ChunkID{number, chunk}
		if !ok || err != nil || r.Key[0] != kindChunk || c.volumes[number] == nil || id.before(c.cursor) {
			return corrupt("chunk record", r.Value)
		}
		c.dropTo(id)
		c.cursor = ChunkID{number, chunk + 1}
		if rec.changed > c.base {
			c.add(wanted{id, slices.Clone(r.Value)})
		}
	}
	return nil
}

// TableDone says that the table is complete.
func (c *Copy) TableDone() { c.dropTo(ChunkID{Volume: 1<<32 - 1}) }

func (id ChunkID) before(o ChunkID) bool {
	return id.Volume < o.Volume || id.Volume == o.Volume && id.Chunk < o.Chunk
}

// dropTo drops the own chunks from the cursor up to id, which the view lacks.
func (c *Copy) dropTo(id ChunkID) {
	for _, v := range c.r.order {
		if v.number < c.cursor.Volume || v.number > id.Volume {
			continue
		}
		from := block.Chunk(0)
		if v.number == c.cursor.Volume {
			from = c.cursor.Chunk
		}
		for at, ok := v.chunks.next(from); ok && (v.number < id.Volume || at < id.Chunk); at, ok = v.chunks.next(at + 1) {
			c.add(wanted{id: ChunkID{v.number, at}})
		}
	}
}

func (c *Copy) add(w wanted) {
	c.want = append(c.want, w)
	c.volumes[w.id.Volume].table++
}

// Chunks is how many chunks the copy replaces or drops, and how many of these
// are done.
func (c *Copy) Chunks() (done, total int) { return c.next - len(c.chunks), len(c.want) }

// Begin returns the job that marks the replica and makes the volumes that it
// does not know.
func (c *Copy) Begin() *Job {
	r := c.r
	mark := &installing{base: c.base, target: c.group.applied}
	group := r.group
	group.volumes = max(group.volumes, c.group.volumes)
	m := newMerger(r)
	var fresh []*copyVolume
	m.batch = m.store.NewBatch()
	m.batch.Set(appendHead(nil, r.local, kindCopy), appendInstalling(nil, mark))
	m.batch.Set(appendHead(nil, r.local, kindGroup), appendGroup(nil, &group))
	for _, cv := range c.order {
		if cv.v == nil {
			fresh = append(fresh, cv)
			m.batch.Set(appendVolumeKey(nil, r.local, kindVolume, cv.in.record.Volume), appendVolume(nil, cv.in, cv.in.floorVersion))
		}
	}
	return &Job{
		run: func() error { return m.store.Commit(m.batch) },
		finish: func() {
			r.installing = mark
			r.group.volumes = group.volumes
			for _, cv := range fresh {
				v := *cv.in
				v.markers = &markers{}
				v.saved, v.sharing = v.markers, true
				cv.v = &v
				r.adopt(&v)
			}
			r.settleJob(m, nil, r.committed)
		},
	}
}

// Finish returns the job that sets everything but chunks to what the view has,
// in one batch with the new applied index, and removes the mark. Markers become
// the union of both sides', the floor versions the maximum: only the own reaper
// retires markers.
func (c *Copy) Finish() *Job {
	r := c.r
	m := newMerger(r)
	m.batch = m.store.NewBatch()
	for _, cv := range c.order {
		id := cv.in.record.Volume
		cv.in.floorVersion = max(cv.in.floorVersion, cv.v.floorVersion)
		m.batch.Set(appendVolumeKey(m.key[:0], m.local, kindVolume, id), appendVolume(nil, cv.in, cv.in.floorVersion))
		if len(cv.in.record.VolumeValue) > 0 {
			m.batch.Set(appendVolumeKey(m.key[:0], m.local, kindValue, id), cv.in.record.VolumeValue)
		} else {
			m.batch.Delete(appendVolumeKey(m.key[:0], m.local, kindValue, id))
		}
		diffMarkers(cv.v.saved, cv.union, func(g block.Generation, s span) {
			m.batch.Delete(appendMarkerKey(m.key[:0], m.local, cv.in.number, g, s))
		}, func(g block.Generation, s span) {
			m.batch.Set(appendMarkerKey(m.key[:0], m.local, cv.in.number, g, s), appendVersion(m.value[:0], s.written))
		})
	}
	m.batch.Set(appendHead(nil, m.local, kindGroup), appendGroup(nil, c.group))
	m.batch.Delete(appendHead(nil, m.local, kindCopy))
	return &Job{
		run:    func() error { return m.store.Commit(m.batch) },
		finish: func() { c.finish(m) },
	}
}

func (c *Copy) finish(m *merger) {
	r := c.r
	r.group = *c.group
	r.committed = r.group.applied
	r.installing = nil
	r.entries, r.spans = 0, 0
	r.dirty = slices.DeleteFunc(r.dirty, func(v *volume) bool { v.dirty = false; return true })
	for _, cv := range c.order {
		v, in := cv.v, cv.in
		v.record, v.window, v.retained, v.floorVersion = in.record, in.window, in.retained, in.floorVersion
		v.replacedEpoch, v.replacedNonce = in.replacedEpoch, in.replacedNonce
		v.markers, v.saved, v.sharing = cv.union, cv.union, true
		v.valueDirty = false
		// The reaper's place in a marker counts no more: there are new extents below it.
		v.reapCursor = reapCursor{}
		r.spans += v.markers.count()
	}
	r.settleJob(m, nil, r.committed)
}

// union returns what either hides: the spans of both, cut where the other has a
// newer one of the same generation.
func (m *markers) union(o *markers) *markers {
	u := m.clone()
	for i := range o.layers {
		l := &o.layers[i]
		for _, s := range l.spans {
			u.addOld(l.gen, s)
		}
	}
	return u
}

// addOld is add for a marker that may be older than some of those there are.
func (m *markers) addOld(g block.Generation, s span) {
	// What newer spans leave of it, one part after the other.
	var parts []span
	from := s.from
	for i := range m.layers {
		if m.layers[i].gen != g {
			continue
		}
		for _, o := range m.layers[i].spans {
			if o.to <= from || o.from >= s.to || o.written < s.written {
				continue
			}
			if o.from > from {
				parts = append(parts, span{from, o.from, s.written})
			}
			from = o.to
		}
	}
	if from < s.to {
		parts = append(parts, span{from, s.to, s.written})
	}
	for _, p := range parts {
		m.add(g, p)
	}
}
