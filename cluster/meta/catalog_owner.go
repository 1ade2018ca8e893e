package meta

import (
	"context"

	"firn.io/firn/internal/block"
)

// Acquired is the right to try (F1, step 1). The volume is not to be exported
// before a Fence with its epoch and the owner's nonce is committed in every group.
type Acquired struct {
	Volume VolumeMeta // with the new epoch
	Owner  OwnerMeta
	// Wait: the taker must also wait one OwnerTTL between its last Fence and the
	// export, and then call MarkExported: an earlier owner was removed by force
	// and may still serve reads from its cache (F3).
	Wait bool
}

// AcquireOwner takes a volume for a gateway: in one transaction the owner key
// must be absent, the epoch rises by one, the owner key is written under the
// gateway's lease. o.Nonce is new and never 0; o.Epoch is ignored. Calling it again
// with the same nonce finds what the first call did.
//
// A key of the same gateway id whose Boot and Folder are those of o is replaced
// at once: the caller holds that folder's lock, so the older process is dead.
// Busy, naming the owner, while another owns it. Unavailable while the volume is
// being created, and when the lease has ended.
func AcquireOwner(ctx context.Context, s Store, id block.VolumeID, o OwnerMeta, lease LeaseID) (Acquired, error) {
	if o.Nonce == 0 || lease == 0 {
		return Acquired{}, block.Errorf(block.Internal, "volume %s is to be attached without a nonce or a lease", id)
	}
	var out Acquired
	err := attempt(ctx, "attach the volume", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			return false, err
		}
		if err := attachable(v); err != nil {
			return false, err
		}
		ownerKV, err := s.Get(ctx, OwnerKey(id))
		if err != nil {
			return false, err
		}
		if ownerKV.Exists() {
			old, err := DecodeOwner(ownerKV)
			if err != nil {
				return false, err
			}
			if old.Nonce == o.Nonce {
				if old.Epoch != v.Epoch {
					return false, nil // the two reads lie on both sides of a change
				}
				out = Acquired{Volume: v, Owner: old, Wait: v.Forced}
				return true, nil
			}
			proved := old.Gateway == o.Gateway && o.Boot != "" && o.Folder != "" && old.Boot == o.Boot && old.Folder == o.Folder
			if !proved {
				return false, block.Errorf(block.Busy, "volume %q is attached to gateway %q at %s: disconnect its clients, or end that with `firn detach %s`", v.Name, old.Gateway, old.Addr, v.Name)
			}
		}
		v.Epoch++
		v.Holder = o.Nonce
		o.V, o.Epoch = Format, v.Epoch
		out = Acquired{Volume: v, Owner: o, Wait: v.Forced}
		r, err := leased(ctx, s, Txn{
			If:   []Cond{Unchanged(kv), Unchanged(ownerKV)},
			Then: []Op{Put(kv.Key, EncodeVolume(v), 0), Put(ownerKV.Key, encode(o), lease)},
		})
		return r.Succeeded, err
	})
	if err != nil {
		return Acquired{}, err
	}
	return out, nil
}

func attachable(v VolumeMeta) error {
	switch v.State {
	case Creating:
		if v.Waiting != "" {
			return block.Errorf(block.Unavailable, "volume %q is still being created: %s", v.Name, v.Waiting)
		}
		return block.Errorf(block.Unavailable, "volume %q is still being created", v.Name)
	case Deleting:
		return block.Errorf(block.NotFound, "volume %q is being deleted", v.Name)
	}
	return nil
}

// RaiseEpoch gives the owner with that nonce an epoch above seen, the highest
// that a group refused its Fence with: a store restored from a backup hands out
// epochs that the groups have seen before. The new owner must then wait as after
// a forced removal (F3), which Acquired.Wait says. Fenced: the owner key is not
// the caller's any more.
func RaiseEpoch(ctx context.Context, s Store, id block.VolumeID, nonce block.Nonce, seen block.Epoch) (Acquired, error) {
	var out Acquired
	err := attempt(ctx, "raise the epoch", func() (bool, error) {
		v, kv, ownerKV, o, err := owned(ctx, s, id, nonce)
		if err != nil {
			return false, err
		}
		if v.Epoch > seen && v.Epoch == o.Epoch {
			out = Acquired{Volume: v, Owner: o, Wait: v.Forced}
			return true, nil
		}
		v.Epoch = max(v.Epoch, seen) + 1
		v.Forced, v.Holder = true, nonce
		o.Epoch = v.Epoch
		out = Acquired{Volume: v, Owner: o, Wait: true}
		r, err := leased(ctx, s, Txn{
			If:   []Cond{Unchanged(kv), Unchanged(ownerKV)},
			Then: []Op{Put(kv.Key, EncodeVolume(v), 0), Put(ownerKV.Key, encode(o), ownerKV.Lease)},
		})
		return r.Succeeded, err
	})
	return out, err
}

// MarkExported ends the extra wait of Acquired.Wait for later owners.
func MarkExported(ctx context.Context, s Store, id block.VolumeID, nonce block.Nonce) error {
	return attempt(ctx, "note the export", func() (bool, error) {
		v, kv, ownerKV, _, err := owned(ctx, s, id, nonce)
		if err != nil || !v.Forced {
			return err == nil, err
		}
		v.Forced = false
		r, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv), Unchanged(ownerKV)}, Then: []Op{Put(kv.Key, EncodeVolume(v), 0)}})
		return r.Succeeded, err
	})
}

func owned(ctx context.Context, s Store, id block.VolumeID, nonce block.Nonce) (v VolumeMeta, kv, ownerKV KV, o OwnerMeta, err error) {
	if v, kv, err = readVolume(ctx, s, id); err != nil {
		return v, kv, ownerKV, o, err
	}
	if ownerKV, err = s.Get(ctx, OwnerKey(id)); err != nil {
		return v, kv, ownerKV, o, err
	}
	if err = checkOwner(v, ownerKV, nonce); err != nil {
		return v, kv, ownerKV, o, err
	}
	o, err = DecodeOwner(ownerKV)
	return v, kv, ownerKV, o, err
}

// ReattachOwner writes the owner key of a living attachment again, under a new
// lease, after the old lease was lost (etcd was away, or was restored) and while
// no other has taken the volume: the key must be absent or the caller's, and the
// epoch in the store not above the attachment's, unless a call of RaiseEpoch
// whose answer was lost raised it. Fenced otherwise. Nothing was fenced in the
// groups: the attachment goes on with its epoch and nonce.
func ReattachOwner(ctx context.Context, s Store, id block.VolumeID, o OwnerMeta, lease LeaseID) error {
	o.V = Format
	return attempt(ctx, "attach the volume again", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			return false, err
		}
		ownerKV, err := s.Get(ctx, OwnerKey(id))
		if err != nil {
			return false, err
		}
		if ownerKV.Exists() {
			if err := checkOwner(v, ownerKV, o.Nonce); err != nil {
				return false, err
			}
		}
		if v.Epoch > o.Epoch && v.Holder != o.Nonce || v.State != Ready {
			return false, block.Errorf(block.Fenced, "volume %q was attached elsewhere, or deleted, since", v.Name)
		}
		v.Epoch = max(v.Epoch, o.Epoch)
		v.Holder, o.Epoch = o.Nonce, v.Epoch
		r, err := leased(ctx, s, Txn{
			If:   []Cond{Unchanged(kv), Unchanged(ownerKV)},
			Then: []Op{Put(ownerKV.Key, encode(o), lease), Put(kv.Key, EncodeVolume(v), 0)},
		})
		return r.Succeeded, err
	})
}

// ReleaseOwner ends an attachment in good order: its user has ended all its
// operations and serves nothing any more. It is no error if the key is gone or
// another's.
func ReleaseOwner(ctx context.Context, s Store, id block.VolumeID, nonce block.Nonce) error {
	return attempt(ctx, "detach the volume", func() (bool, error) {
		kv, err := s.Get(ctx, OwnerKey(id))
		if err != nil || !kv.Exists() {
			return err == nil, err
		}
		o, err := DecodeOwner(kv)
		if err != nil || o.Nonce != nonce {
			return err == nil, err
		}
		r, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Delete(kv.Key)}})
		return r.Succeeded, err
	})
}

// ForceOwner removes an owner that may still be alive, and marks that in the
// same transaction: the next owner waits (F3). The epoch rises, so that the
// removed one cannot come back by ReattachOwner. It returns the removed owner.
// NotFound: the volume is not attached (any more).
func ForceOwner(ctx context.Context, s Store, id block.VolumeID) (OwnerMeta, error) {
	var out OwnerMeta
	err := attempt(ctx, "detach the volume by force", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			return false, err
		}
		ownerKV, err := s.Get(ctx, OwnerKey(id))
		if err != nil {
			return false, err
		}
		if !ownerKV.Exists() {
			return false, block.Errorf(block.NotFound, "volume %q is not attached", v.Name)
		}
		if out, err = DecodeOwner(ownerKV); err != nil {
			return false, err
		}
		v.Forced, v.Holder = true, 0
		v.Epoch++
		r, err := s.Txn(ctx, Txn{
			If:   []Cond{Unchanged(kv), Unchanged(ownerKV)},
			Then: []Op{Delete(ownerKV.Key), Put(kv.Key, EncodeVolume(v), 0)},
		})
		return r.Succeeded, err
	})
	return out, err
}
