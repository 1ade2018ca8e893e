package meta

import (
	"context"

	"firn.io/firn/internal/block"
)

// NewVolume is what a volume is created from.
type NewVolume struct {
	// ID is drawn by the caller, so that a repeated call finds its own volume.
	ID        block.VolumeID
	Name      string
	SizeBytes int64
	BlockSize int // 512 or 4096; 0 is 512
	Replicas  int // 0 is 3, or the number of nodes below that
}

// CreateVolume reserves the name and writes the volume in state Creating; the
// coordinator makes it Ready. Exists: the name is taken. Invalid: a bad name,
// size, block size or number of replicas, or more replicas than nodes.
func CreateVolume(ctx context.Context, s Store, n NewVolume) (VolumeMeta, error) {
	if n.BlockSize == 0 {
		n.BlockSize = 512
	}
	if err := checkNew(n); err != nil {
		return VolumeMeta{}, err
	}
	nodes, err := ListNodes(ctx, s)
	if err != nil {
		return VolumeMeta{}, err
	}
	usable := 0
	for _, node := range nodes {
		if node.Usable() {
			usable++
		}
	}
	if n.Replicas == 0 {
		n.Replicas = min(3, usable)
		if n.Replicas == 2 {
			n.Replicas = 1 // two replicas survive no loss that one does not
		}
	}
	if n.Replicas > usable || n.Replicas == 0 {
		return VolumeMeta{}, block.Errorf(block.Invalid, "%d replicas need %d nodes with a working disk, the cluster has %d", max(n.Replicas, 1), max(n.Replicas, 1), usable)
	}

	v := VolumeMeta{
		V: Format, ID: n.ID, Name: n.Name, SizeBytes: n.SizeBytes, BlockSize: n.BlockSize, Replicas: n.Replicas,
		Generation: 1, Settings: 1, State: Creating,
	}
	r, err := s.Txn(ctx, Txn{
		If:   []Cond{Absent(NameKey(v.Name)), Absent(VolumeKey(v.ID))},
		Then: []Op{Put(NameKey(v.Name), []byte(v.ID.String()), 0), Put(VolumeKey(v.ID), EncodeVolume(v), 0)},
		Else: []Op{Read(VolumeKey(v.ID))},
	})
	if err != nil {
		return VolumeMeta{}, err
	}
	if r.Succeeded {
		return v, nil
	}
	if own := r.Read[0]; own.Exists() {
		return DecodeVolume(own)
	}
	return VolumeMeta{}, block.Errorf(block.Exists, "there is a volume %q already", v.Name)
}

func checkNew(n NewVolume) error {
	if err := CheckVolumeName(n.Name); err != nil {
		return err
	}
	if n.ID.IsZero() {
		return block.Errorf(block.Internal, "volume %q is to be created without an id", n.Name)
	}
	if n.BlockSize != 512 && n.BlockSize != 4096 {
		return block.Errorf(block.Invalid, "block size %d: use 512 or 4096", n.BlockSize)
	}
	if err := CheckSize(n.SizeBytes, n.BlockSize); err != nil {
		return err
	}
	if n.Replicas < 0 || n.Replicas > MaxReplicas || n.Replicas > 0 && n.Replicas%2 == 0 {
		return block.Errorf(block.Invalid, "%d replicas: use 1, 3 or 5", n.Replicas)
	}
	return nil
}

// CheckSize tells why a volume cannot have that size (kind Invalid).
func CheckSize(sizeBytes int64, blockSize int) error {
	switch {
	case sizeBytes <= 0:
		return block.Errorf(block.Invalid, "size %d: it must be above 0", sizeBytes)
	case sizeBytes%int64(blockSize) != 0:
		return block.Errorf(block.Invalid, "size %d is no multiple of the block size %d", sizeBytes, blockSize)
	case sizeBytes > MaxVolumeBytes:
		return block.Errorf(block.Invalid, "size %d: the largest is %d (%d TiB)", sizeBytes, int64(MaxVolumeBytes), MaxVolumeBytes>>40)
	}
	return nil
}

// Usable tells whether the node has a disk that new replicas can go to.
func (n *NodeMeta) Usable() bool {
	for _, d := range n.Disks {
		if !d.Failed && !d.Absent {
			return true
		}
	}
	return false
}

// RenameVolume moves a volume to a new name, attached or not. Exists: the new
// name is taken. The old name is free at once. NotFound: no volume has the old
// name, perhaps because an earlier call that failed has happened.
func RenameVolume(ctx context.Context, s Store, name, to string) (VolumeMeta, error) {
	if err := CheckVolumeName(to); err != nil {
		return VolumeMeta{}, err
	}
	var out VolumeMeta
	err := attempt(ctx, "rename the volume", func() (bool, error) {
		v, kv, err := findVolume(ctx, s, name)
		if err != nil {
			return false, err
		}
		if out = v; name == to {
			return true, nil
		}
		v.Name = to
		out = v
		r, err := s.Txn(ctx, Txn{
			If: []Cond{Unchanged(kv), Absent(NameKey(to))},
			Then: []Op{Delete(NameKey(name)), Put(NameKey(to), []byte(v.ID.String()), 0),
				Put(kv.Key, EncodeVolume(v), 0)},
			Else: []Op{Read(NameKey(to))},
		})
		if err == nil && !r.Succeeded && r.Read[0].Exists() {
			return false, block.Errorf(block.Exists, "there is a volume %q already", to)
		}
		return r.Succeeded, err
	})
	return out, err
}

// UpdateVolume changes settings of a volume: change edits SizeBytes, WantBytes,
// ReadOnly, Generation or Epoch, and may refuse with an error. If it changed the
// size or the policy and left Settings alone, Settings rises by one; it never falls.
//
// With by = 0 the volume must have no owner (Busy, naming it, otherwise): with
// an owner, changes of what the groups know go through it (F8). With by set, the
// caller must be the owner with that nonce (Fenced otherwise).
func UpdateVolume(ctx context.Context, s Store, id block.VolumeID, by block.Nonce, change func(*VolumeMeta) error) (VolumeMeta, error) {
	var out VolumeMeta
	err := attempt(ctx, "change the volume", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			return false, err
		}
		if v.State == Deleting {
			return false, block.Errorf(block.NotFound, "volume %s is being deleted", id)
		}
		owner, err := s.Get(ctx, OwnerKey(id))
		if err != nil {
			return false, err
		}
		if err := checkOwner(v, owner, by); err != nil {
			return false, err
		}
		was := v
		if err := change(&v); err != nil {
			return false, err
		}
		if err := CheckSize(v.SizeBytes, v.BlockSize); err != nil {
			return false, err
		}
		if v.Settings == was.Settings && (v.SizeBytes != was.SizeBytes || v.ReadOnly != was.ReadOnly) {
			v.Settings++
		}
		if v.Settings < was.Settings || v.Epoch < was.Epoch || v.Generation < was.Generation {
			return false, block.Errorf(block.Internal, "volume %s: settings, epoch and generation never fall", id)
		}
		if v.State == Ready && len(v.Spans) < SpansFor(v.SizeBytes) {
			return false, block.Errorf(block.Internal, "volume %s: it has no groups for a size of %d; set WantBytes first", id, v.SizeBytes)
		}
		if v.WantBytes <= v.SizeBytes {
			v.WantBytes = 0
		}
		out = v
		b := EncodeVolume(v)
		if string(b) == string(kv.Value) {
			return true, nil
		}
		r, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv), Unchanged(owner)}, Then: []Op{Put(kv.Key, b, 0)}})
		return r.Succeeded, err
	})
	return out, err
}

func checkOwner(v VolumeMeta, kv KV, by block.Nonce) error {
	if by == 0 && !kv.Exists() {
		return nil
	}
	if !kv.Exists() {
		return block.Errorf(block.Fenced, "volume %q is not attached here any more", v.Name)
	}
	o, err := DecodeOwner(kv)
	if err != nil {
		return err
	}
	if by == 0 {
		return block.Errorf(block.Busy, "volume %q is attached to gateway %q at %s: disconnect its clients, or end that with `firn detach %s`", v.Name, o.Gateway, o.Addr, v.Name)
	}
	if o.Nonce != by {
		return block.Errorf(block.Fenced, "volume %q was taken by gateway %q", v.Name, o.Gateway)
	}
	return nil
}

// WantSize asks the coordinator for the spans of a larger size. It is allowed
// with and without an owner; the volume grows later, by UpdateVolume, once
// SpansFor(sizeBytes) spans are there.
func WantSize(ctx context.Context, s Store, id block.VolumeID, sizeBytes int64) (VolumeMeta, error) {
	var out VolumeMeta
	err := attempt(ctx, "grow the volume", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			return false, err
		}
		if err := CheckSize(sizeBytes, v.BlockSize); err != nil {
			return false, err
		}
		if v.State == Deleting {
			return false, block.Errorf(block.NotFound, "volume %q is being deleted", v.Name)
		}
		if out = v; sizeBytes <= max(v.SizeBytes, v.WantBytes) {
			return true, nil
		}
		v.WantBytes = sizeBytes
		out = v
		r, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Put(kv.Key, EncodeVolume(v), 0)}})
		return r.Succeeded, err
	})
	return out, err
}

// DeleteVolume frees the volume's name and sets it to Deleting, under a new
// epoch; the coordinator deletes its data and then its key. Busy while it is
// attached. NotFound if no volume has that name, perhaps because an earlier call
// that failed has happened.
func DeleteVolume(ctx context.Context, s Store, name string) (VolumeMeta, error) {
	return deleteVolume(ctx, s, name, block.VolumeID{})
}

// DeleteVolumeAs is DeleteVolume as long as the name is that of the volume id.
// NotFound: it is another one's now.
func DeleteVolumeAs(ctx context.Context, s Store, name string, id block.VolumeID) (VolumeMeta, error) {
	return deleteVolume(ctx, s, name, id)
}

// deleteVolume deletes whichever volume has the name if id is zero.
func deleteVolume(ctx context.Context, s Store, name string, id block.VolumeID) (VolumeMeta, error) {
	var out VolumeMeta
	err := attempt(ctx, "delete the volume", func() (bool, error) {
		v, kv, err := findVolume(ctx, s, name)
		if err != nil {
			return false, err
		}
		if !id.IsZero() && v.ID != id {
			return false, block.Errorf(block.NotFound, "the name %q is that of another volume now, %s: volume %s was renamed or removed meanwhile", name, v.ID, id)
		}
		owner, err := s.Get(ctx, OwnerKey(v.ID))
		if err != nil {
			return false, err
		}
		if err := checkOwner(v, owner, 0); err != nil {
			return false, err
		}
		v.State, v.Waiting, v.WantBytes, v.Holder = Deleting, "", 0, 0
		v.Epoch++
		v.Settings++
		out = v
		r, err := s.Txn(ctx, Txn{
			If:   []Cond{Unchanged(kv), Absent(OwnerKey(v.ID)), ValueIs(NameKey(name), []byte(v.ID.String()))},
			Then: []Op{Delete(NameKey(name)), Put(kv.Key, EncodeVolume(v), 0)},
		})
		return r.Succeeded, err
	})
	return out, err
}
