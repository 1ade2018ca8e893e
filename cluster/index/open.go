package index

import (
	"encoding/binary"
	"slices"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// Open reads what a store holds: everything that stays in memory (volume and
// group records, range markers, chunk versions, live bits). It blocks, before
// the Loop runs. Kinds Corrupt, Unsupported, and what the store fails with.
func Open(store Store, opts Options) (*DB, error) {
	db := &DB{store: store, opts: opts, replicas: make(map[seglog.ReplicaKey]*Replica)}
	db.refresh()
	if err := db.load(); err != nil {
		db.release(db.snap)
		return nil, err
	}
	return db, nil
}

func (db *DB) load() error {
	fresh := true
	var found []*Replica
	err := scan(db.snap, appendHead(nil, 0, 0), appendHead(nil, 1, 0), func(key, value []byte) error {
		fresh = false
		if len(key) < headLen {
			return corrupt("key", key)
		}
		switch key[4] {
		case kindFormat:
			if len(value) != 4 || binary.LittleEndian.Uint32(value) != formatVersion {
				return block.Errorf(block.Unsupported, "index: its format is %x, this build knows version %d: start the build of Firn that wrote it, or a newer one", value, formatVersion)
			}
		case kindCatalog:
			k, ok := decodeCatalogKey(key)
			if !ok || len(value) != 4 {
				return corrupt("catalog entry", key)
			}
			local := localID(binary.LittleEndian.Uint32(value))
			if local == 0 || local+1 == 0 {
				return corrupt("catalog entry", value)
			}
			found = append(found, newReplica(db, k, local, groupRecord{}))
		default:
			return corrupt("key", key)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if fresh {
		b := db.store.NewBatch()
		b.Set(appendHead(nil, 0, kindFormat), binary.LittleEndian.AppendUint32(nil, formatVersion))
		if err := db.store.Commit(b); err != nil {
			return err
		}
	}
	for _, r := range found {
		db.lastID = max(db.lastID, r.local)
		if err := r.load(); err != nil {
			return block.Wrap(block.KindOf(err), err, "index: replica %d of group %d", r.key.Replica, r.key.Group)
		}
		db.replicas[r.key] = r
	}
	return nil
}

// load reads a replica's records. Keys of one kind come together, and the
// volumes' before all that go by their numbers.
func (r *Replica) load() error {
	numbers := make(map[uint32]*volume)
	known := false
	err := scan(r.db.snap, appendHead(nil, r.local, 0), appendHead(nil, r.local, kindExtent), func(key, value []byte) (err error) {
		if len(key) < headLen {
			return corrupt("key", key)
		}
		switch key[4] {
		case kindGroup:
			if len(key) != headLen {
				break
			}
			known = true
			r.group, err = decodeGroup(value)
			return err
		case kindVolume:
			return r.loadVolume(key, value, numbers)
		case kindValue:
			id, ok := decodeVolumeKey(key)
			if v := r.volumes[id]; ok && v != nil {
				v.record.VolumeValue = slices.Clone(value)
				return nil
			}
		case kindCopy:
			if len(key) == headLen {
				r.installing, err = decodeInstalling(value)
				return err
			}
		case kindLive:
			return r.loadLive(key, value)
		case kindMarker, kindChunk, kindUsage:
			if len(key) >= headLen+4 {
				if v := numbers[binary.BigEndian.Uint32(key[headLen:])]; v != nil {
					return r.loadNumbered(v, key, value)
				}
			}
		}
		return corrupt("key", key)
	})
	if err != nil {
		return err
	}
	if !known {
		return block.Errorf(block.Corrupt, "its group record is missing")
	}
	for _, v := range numbers {
		if v.number > r.group.volumes {
			return block.Errorf(block.Corrupt, "volume number %d of %d", v.number, r.group.volumes)
		}
	}
	slices.SortFunc(r.order, func(a, b *volume) int { return int(int64(a.number) - int64(b.number)) })
	r.catalog = true
	r.committed, r.durable = r.group.applied, r.group.applied
	return nil
}

func (r *Replica) loadVolume(key, value []byte, numbers map[uint32]*volume) error {
	id, ok := decodeVolumeKey(key)
	if !ok {
		return corrupt("volume key", key)
	}
	v, err := decodeVolume(id, value)
	if err != nil {
		return err
	}
	if v.number == 0 || numbers[v.number] != nil {
		return corrupt("volume record", value)
	}
	numbers[v.number] = v
	r.adopt(v)
	return nil
}

func (r *Replica) loadNumbered(v *volume, key, value []byte) error {
	switch key[4] {
	case kindMarker:
		_, g, s, ok := decodeMarkerKey(key)
		written, err := decodeVersion(value)
		if !ok || err != nil {
			return corrupt("range marker", key)
		}
		s.written = written
		if err := v.loadMarker(g, s, key); err != nil {
			return err
		}
		r.spans++
	case kindChunk:
		_, c, ok := decodeChunkKey(key)
		rec, err := decodeChunk(value)
		if !ok || err != nil {
			return corrupt("chunk record", value)
		}
		v.chunks.set(c, rec.version)
		if !rec.plain() {
			v.chunks.markExtras(c)
		}
	case kindUsage:
		n, err := decodeUsage(value)
		if err != nil || len(key) != usageLen {
			return corrupt("usage", value)
		}
		v.storeBlocks = n
	}
	return nil
}

func (r *Replica) loadLive(key, value []byte) error {
	s, generation, ok := decodeLiveKey(key)
	if !ok {
		return corrupt("live bits", key)
	}
	if generation != r.db.segmentGeneration(s) {
		return nil
	}
	b, err := decodeBitmap(value)
	if err != nil {
		return err
	}
	for i, w := range b {
		for j := 0; j < 4; j++ {
			if m := uint16(w >> (16 * j)); m != 0 {
				r.db.live.set(s, uint16(i*64+16*j), m)
			}
		}
	}
	return nil
}

func appendUsage(dst []byte, blocks int64) []byte { return binary.AppendUvarint(dst, uint64(blocks)) }

func decodeUsage(p []byte) (int64, error) {
	n, width := binary.Uvarint(p)
	if width != len(p) || width <= 0 || n > 1<<62 {
		return 0, corrupt("usage", p)
	}
	return int64(n), nil
}

// scan calls f for all keys in [from, to) until it fails.
func scan(s Snapshot, from, to []byte, f func(key, value []byte) error) (err error) {
	it, err := s.Iterate(from, to)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := it.Close(); err == nil {
			err = cerr
		}
	}()
	for ok := it.Seek(from); ok; ok = it.Next() {
		if err := f(it.Key(), it.Value()); err != nil {
			return err
		}
	}
	return it.Err()
}
