package index

import (
	"bytes"
	"slices"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// Creation is the state that a new replica begins with. All replicas of a
// group are created with the same one but for their ids.
type Creation struct {
	// Index and Term of the entry that the log begins after.
	Index, Term uint64
	// Conf is the encoded membership, opaque here; the counter of replica ids
	// is in it.
	Conf []byte
	// Era goes into every Version.
	Era uint16
}

// Replica is the replicated state of one replica.
//
// Invariants:
//   - every extent of the delta that was not moved is newer than all of frozen
//     and of the store, and so every such one of frozen than all of the store;
//   - a chunk without a record in its volume's table has no extents anywhere;
//   - at most one job changes what the store holds of the replica (busy);
//   - the store holds the state at committed; everything above is in memory and
//     in the log.
type Replica struct {
	db    *DB
	key   seglog.ReplicaKey
	local localID

	group   groupRecord
	volumes map[block.VolumeID]*volume
	order   []*volume // by number, which is the order of creation

	// What changed since the last freeze.
	updates int
	bytes   int64
	entries uint64
	touched []*volume // have a delta
	dirty   []*volume // have a changed record

	frozenBytes int64
	spans       int // range markers of all volumes

	busy    bool
	removed bool
	// installing is set while the state is a mixture of two: see Copy.
	installing *installing
	catalog    bool // the store knows the replica
	committed  uint64
	durable    uint64
	deferred   []seglog.Move // wait for the job in flight
}

func newReplica(db *DB, key seglog.ReplicaKey, local localID, g groupRecord) *Replica {
	return &Replica{db: db, key: key, local: local, group: g, volumes: make(map[block.VolumeID]*volume)}
}

// Key names the replica.
func (r *Replica) Key() seglog.ReplicaKey { return r.key }

// Applied is the last applied index and its term.
func (r *Replica) Applied() (index, term uint64) { return r.group.applied, r.group.term }

// AppliedVersion is Applied under the replica's era: what a token is compared to.
func (r *Replica) AppliedVersion() block.Version {
	return block.MakeVersion(r.group.era, r.group.applied)
}

// DurablyApplied is the index of the last durable checkpoint, 0 before the first.
func (r *Replica) DurablyApplied() uint64 { return r.durable }

// Conf is what ApplyConf or Create gave last. The caller must not change it.
func (r *Replica) Conf() []byte { return r.group.conf }

// Era of the replica's versions.
func (r *Replica) Era() uint16 { return r.group.era }

// Feature is the group's feature level.
func (r *Replica) Feature() uint32 { return r.group.feature }

// Record returns the group's record of a volume. The caller must not change
// its VolumeValue.
func (r *Replica) Record(v block.VolumeID) (wire.VolumeRecord, bool) {
	if vol := r.volumes[v]; vol != nil {
		return vol.record, true
	}
	return wire.VolumeRecord{}, false
}

// Volumes returns the volumes that the group knows, tombstones included, in
// the order of their ids.
func (r *Replica) Volumes() []block.VolumeID {
	ids := make([]block.VolumeID, 0, len(r.order))
	for _, v := range r.order {
		ids = append(ids, v.record.Volume)
	}
	slices.SortFunc(ids, func(a, b block.VolumeID) int { return bytes.Compare(a[:], b[:]) })
	return ids
}

// ChunkVersion is the version of a chunk (S4); false if the volume is unknown.
func (r *Replica) ChunkVersion(v block.VolumeID, c block.Chunk) (block.Version, bool) {
	if vol := r.volumes[v]; vol != nil {
		return vol.version(c), true
	}
	return 0, false
}

// Usage is about how many bytes of this disk hold data of the volume: exact
// after a checkpoint, above it what was overwritten since is counted twice.
// Zeros, index and log count nothing; what trims hide counts until it is reaped.
func (r *Replica) Usage(v block.VolumeID) int64 {
	vol := r.volumes[v]
	if vol == nil {
		return 0
	}
	n := vol.storeBlocks
	if vol.delta != nil {
		n += vol.delta.blocks
	}
	if vol.frozen != nil {
		n += vol.frozen.blocks
	}
	return n * block.Size
}

// Pending says what a checkpoint would merge.
type Pending struct {
	// Updates counts the extents and markers added to the delta since it began.
	Updates int
	// Bytes is about the memory of the delta and of the one being merged.
	Bytes int64
	// Entries is how many entries were applied since the last checkpoint began.
	Entries uint64
	// Markers are range markers that wait to be reaped.
	Markers int
	// Busy says that a job of the replica is in flight.
	Busy bool
}

// Pending is what the node decides on when to checkpoint and to reap.
func (r *Replica) Pending() Pending {
	return Pending{Updates: r.updates, Bytes: r.bytes + r.frozenBytes, Entries: r.entries, Markers: r.spans, Busy: r.busy}
}

// touch returns the chunk's delta, made if there is none.
func (r *Replica) touch(v *volume, c block.Chunk) *chunkDelta {
	if v.delta == nil {
		v.delta = &volumeDelta{chunks: make(map[block.Chunk]*chunkDelta)}
		r.touched = append(r.touched, v)
	}
	d := v.delta.chunks[c]
	if d == nil {
		d = &chunkDelta{extras: v.chunks.hasExtras(c)}
		v.delta.chunks[c] = d
		r.bytes += d.bytes()
	}
	return d
}

// add puts an extent into the delta and sets its live bits.
func (r *Replica) add(v *volume, d *chunkDelta, e extent, crcs []uint32) {
	before := d.bytes()
	live := d.insert(e, crcs, &v.retained, func(x *extent, mask uint16) {
		v.delta.blocks -= int64(r.db.live.clear(x.segment, x.at, mask))
	})
	r.bytes += d.bytes() - before
	if live == 0 {
		return
	}
	r.updates++
	if !e.zero() {
		r.db.live.set(e.segment, e.at, live)
		v.delta.blocks += blocksIn(live)
	}
}

// mark puts a range marker over the chunks of s.
func (r *Replica) mark(v *volume, g block.Generation, s span) {
	r.ownMarkers(v)
	before := v.markers.count()
	v.markers.add(g, s)
	r.spans += v.markers.count() - before
	r.updates++
	r.soil(v)
}

// ownMarkers copies the volume's markers if a job or the last checkpoint holds them.
func (r *Replica) ownMarkers(v *volume) {
	if v.sharing {
		v.markers, v.sharing = v.markers.clone(), false
	}
}

// soil notes that the volume's record changed.
func (r *Replica) soil(v *volume) {
	if !v.dirty {
		v.dirty = true
		r.dirty = append(r.dirty, v)
	}
}

// create adds a volume's record.
func (r *Replica) create(id block.VolumeID) *volume {
	r.group.volumes++
	v := &volume{number: r.group.volumes, markers: &markers{}}
	v.saved, v.sharing = v.markers, true
	v.record.Volume = id
	v.window.reset()
	r.adopt(v)
	r.soil(v)
	return v
}

func (r *Replica) adopt(v *volume) {
	r.volumes[v.record.Volume] = v
	r.order = append(r.order, v)
}
