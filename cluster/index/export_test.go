package index

import (
	"fmt"
	"slices"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// SetRetained stands for the command of a later format level that brings the
// list of retained generations. It is an entry of the log like any other.
func (r *Replica) SetRetained(index, term uint64, id block.VolumeID, from block.Generation, list []block.Generation) {
	if v := r.volumes[id]; v != nil {
		v.retained = retention{from: from, list: slices.Clone(list)}
		r.soil(v)
	}
	r.ApplyEmpty(index, term)
}

// FloorVersion of a volume.
func (r *Replica) FloorVersion(id block.VolumeID) block.Version { return r.volumes[id].floorVersion }

// CheckLive recomputes the live bits of all replicas from their extents. exact
// asks for equality, which holds while retention does not shrink; else the bits
// must cover what is needed.
func (db *DB) CheckLive(exact bool) error {
	want := map[seglog.Location]string{}
	put := func(who string, at seglog.Location, mask uint16) error {
		for b := range uint16(16) {
			if mask&(1<<b) == 0 {
				continue
			}
			l := seglog.Location{Segment: at.Segment, Block: at.Block + b}
			if _, twice := want[l]; twice && who == "store" && want[l] == "store" {
				return fmt.Errorf("%v is pointed at twice by the store", l)
			}
			want[l] = who
		}
		return nil
	}
	// A job that was committed and not finished is in the store already.
	for _, r := range db.Replicas() {
		exact = exact && !r.busy
	}
	for _, r := range db.Replicas() {
		for _, v := range r.order {
			for name, d := range map[string]*volumeDelta{"delta": v.delta, "frozen": v.frozen} {
				if d == nil {
					continue
				}
				blocks := int64(0)
				for _, c := range d.chunks {
					for i := range c.extents {
						if e := &c.extents[i]; !e.zero() {
							put(name, seglog.Location{Segment: e.segment, Block: e.at}, e.live)
							blocks += blocksIn(e.live)
						}
					}
				}
				if blocks != d.blocks {
					return fmt.Errorf("%s counts %d blocks, holds %d", name, d.blocks, blocks)
				}
			}
			if r.busy && r.installing != nil {
				continue // what a copy has written counts when its job is finished; until then it is held
			}
			n, err := r.storeLive(v, put)
			if err != nil {
				return err
			}
			if exact && n != v.storeBlocks {
				return fmt.Errorf("the store holds %d live blocks of volume %d, counted %d", n, v.number, v.storeBlocks)
			}
		}
	}
	total := int64(0)
	for s, e := range db.live.segments {
		if e.live != e.bits.count() || e.held < 0 {
			return fmt.Errorf("segment %d counts %d live, %d held, has %d bits", s, e.live, e.held, e.bits.count())
		}
		total += int64(e.live)
		for b := range len(e.bits) * 64 {
			l := seglog.Location{Segment: s, Block: uint16(b)}
			set := e.bits.get(uint16(b), 1) != 0
			who, needed := want[l]
			if needed && !set || exact && set && !needed {
				return fmt.Errorf("live bit of %v is %v, pointed at by %q", l, set, who)
			}
			delete(want, l)
		}
	}
	if len(want) > 0 || total != db.live.total {
		return fmt.Errorf("live bits missing for %v, total %d of %d", want, db.live.total, total)
	}
	return nil
}

// storeLive resolves what the store holds of a volume by its extents alone.
func (r *Replica) storeLive(v *volume, put func(string, seglog.Location, uint16) error) (blocks int64, err error) {
	m := &merger{snap: r.db.acquire(), local: r.local}
	defer r.db.release(m.snap)
	if err := m.open(); err != nil {
		return 0, err
	}
	defer m.it.Close()
	keep := v.retention()
	type at struct {
		c block.Chunk
		b uint16
	}
	var todo []at
	err = scan(m.snap, appendExtentPrefix(nil, r.local, v.number, 0, 0), appendExtentPrefix(nil, r.local, v.number+1, 0, 0), func(key, _ []byte) error {
		k, ok := decodeExtentKey(key)
		if !ok {
			return corrupt("key", key)
		}
		if _, known := v.chunks.get(k.chunk); !known && !v.record.Tombstone {
			return fmt.Errorf("chunk %d has extents and no record", k.chunk)
		}
		if cell := (at{k.chunk, k.block &^ 15}); len(todo) == 0 || todo[len(todo)-1] != cell {
			todo = append(todo, cell)
		}
		return nil
	})
	for _, t := range todo {
		if err != nil {
			break
		}
		if err = m.readCell(v.number, t.c, t.b); err != nil {
			break
		}
		m.cell.reset()
		for j := range m.found {
			e := &m.found[j]
			m.cell.add(candidate{gen: e.key.gen, written: e.key.written, layer: layerStore, from: uint8(e.key.block - t.b), count: e.count, src: j})
		}
		m.cell.resolve(&keep)
		for i := range m.cell.cands {
			k := &m.cell.cands[i]
			if k.tied {
				return 0, fmt.Errorf("two extents of the store name the same bytes in chunk %d, cell %d", t.c, t.b)
			}
			if e := &m.found[k.src]; e.place.Kind == KindLocal {
				blocks += blocksIn(k.live)
				if err = put("store", e.place.At, k.live>>k.from); err != nil {
					break
				}
			}
		}
	}
	return blocks, err
}

// PutCold stands for a tier commit of a later format level: it stores an extent
// of four blocks in a cold object, and the object's name in the chunk's record.
func (r *Replica) PutCold(id block.VolumeID, c block.Chunk, b uint16, written, changed block.Version) error {
	v := r.volumes[id]
	batch := r.db.store.NewBatch()
	batch.Set(appendExtentKey(nil, r.local, extentKey{v.number, c, b, 0, written}),
		appendExtent(nil, &stored{count: 4, place: Place{Kind: KindCold, Framed: true, Skip: 2, Codec: 1, Key: 3, Stored: 9000, Object: 1, Offset: 77}, crcs: []uint32{1, 2, 3, 4}}))
	batch.Set(appendChunkKey(nil, r.local, v.number, c),
		appendChunk(nil, &chunkRecord{version: written, changed: changed, objects: []object{{1, 12345, "cold/1"}}}))
	return r.db.store.Commit(batch)
}

// ChunkRecord is what the store holds of a chunk.
func (r *Replica) ChunkRecord(id block.VolumeID, c block.Chunk) (version, changed block.Version, objects int, err error) {
	p, ok, err := r.db.snap.Get(nil, appendChunkKey(nil, r.local, r.volumes[id].number, c))
	if !ok || err != nil {
		return 0, 0, 0, err
	}
	rec, err := decodeChunk(p)
	return rec.version, rec.changed, len(rec.objects), err
}
