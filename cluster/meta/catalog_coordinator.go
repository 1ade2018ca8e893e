package meta

import (
	"context"

	"firn.io/firn/internal/block"
)

// Guard proves in each transaction of a coordinator that it is still elected:
// its election key was created at one revision and holds its nonce. A
// transaction of one whose time is over changes nothing (C2).
type Guard struct {
	created Revision
	value   []byte
}

// Conds are the conditions that the guard adds to a transaction.
func (g Guard) Conds() []Cond {
	return []Cond{CreatedAt(ElectionKey, g.created), ValueIs(ElectionKey, g.value)}
}

// errDeposed is what a guarded function fails with once another is elected.
func errDeposed(what string) error {
	return block.Errorf(block.Fenced, "%s: this coordinator's time is over", what)
}

// Campaign tries to become the coordinator, under the lease. won is false while
// another is. nonce is new for each campaign that may have failed.
func Campaign(ctx context.Context, s Store, node block.NodeID, nonce uint64, lease LeaseID) (g Guard, won bool, err error) {
	value := encode(Leader{V: Format, Node: node, Nonce: nonce})
	r, err := leased(ctx, s, Txn{
		If:   []Cond{Absent(ElectionKey)},
		Then: []Op{Put(ElectionKey, value, lease), Read(ElectionKey)},
		Else: []Op{Read(ElectionKey)},
	})
	if err != nil {
		return Guard{}, false, err
	}
	kv := r.Read[0]
	if string(kv.Value) != string(value) || kv.Lease != lease {
		return Guard{}, false, nil
	}
	return Guard{created: kv.Created, value: value}, true, nil
}

// Resign gives the election up, if the guard still holds.
func Resign(ctx context.Context, s Store, g Guard) error {
	_, err := s.Txn(ctx, Txn{If: g.Conds(), Then: []Op{Delete(ElectionKey)}})
	return err
}

// Place is where a replica of a new group goes.
type Place struct {
	Node block.NodeID
	Disk block.DiskID
}

// MaxNewGroups bounds the groups of one CreateGroups.
const MaxNewGroups = MaxTxnOps - 8

// CreateGroups writes new groups, one for each list of places, with ids from the
// counter and replica ids from 1. The nodes make the replicas and acknowledge
// them. If it fails with Unavailable the groups may be there; they are found by
// a list, and a repeated call would make others.
func CreateGroups(ctx context.Context, s Store, g Guard, places [][]Place) ([]GroupMeta, error) {
	if len(places) > MaxNewGroups {
		return nil, block.Errorf(block.Internal, "%d new groups in one transaction, the limit is %d", len(places), MaxNewGroups)
	}
	var out []GroupMeta
	err := attempt(ctx, "create groups", func() (bool, error) {
		out = out[:0]
		counter, err := s.Get(ctx, GroupCounterKey)
		if err != nil {
			return false, err
		}
		last, err := decodeCounter(counter)
		if err != nil {
			return false, err
		}
		t := Txn{
			If:   append(g.Conds(), Unchanged(counter)),
			Then: []Op{Put(GroupCounterKey, encodeCounter(last+uint64(len(places))), 0)},
			Else: []Op{Read(ElectionKey)},
		}
		for i, p := range places {
			gm := GroupMeta{V: Format, ID: block.GroupID(last + uint64(i) + 1), Era: 1}
			for j, at := range p {
				gm.Replicas = append(gm.Replicas, ReplicaMeta{Node: at.Node, Disk: at.Disk, Replica: block.ReplicaID(j + 1)})
			}
			out = append(out, gm)
			t.If = append(t.If, Absent(GroupKey(gm.ID)))
			t.Then = append(t.Then, Put(GroupKey(gm.ID), EncodeGroup(gm), 0))
		}
		done, _, err := guarded(ctx, s, "create groups", g, t)
		return done, err
	})
	return out, err
}

// guarded runs a transaction whose only Else is a Read of the election key; it
// tells a lost election from other conditions that did not hold.
func guarded(ctx context.Context, s Store, what string, g Guard, t Txn) (done bool, at Revision, err error) {
	r, err := s.Txn(ctx, t)
	if err != nil || r.Succeeded {
		return err == nil, r.Revision, err
	}
	if kv := r.Read[0]; kv.Created != g.created || string(kv.Value) != string(g.value) {
		return false, 0, errDeposed(what)
	}
	return false, 0, nil
}

// ChangeVolume is the coordinator's compare-and-set of one volume: change edits
// State, Waiting, Spans or Layout and returns false to leave it as it is. It
// is called with the newest value. It returns the volume as it stands then, and
// the revision of that.
func ChangeVolume(ctx context.Context, s Store, g Guard, id block.VolumeID, change func(*VolumeMeta) bool) (VolumeMeta, Revision, error) {
	var out VolumeMeta
	var at Revision
	err := attempt(ctx, "change the volume's layout", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			return false, err
		}
		out, at = v, kv.Modified
		if !change(&v) {
			return true, nil
		}
		out = v
		var done bool
		done, at, err = guarded(ctx, s, "change the volume's layout", g, Txn{
			If: append(g.Conds(), Unchanged(kv)), Then: []Op{Put(kv.Key, EncodeVolume(v), 0)}, Else: []Op{Read(ElectionKey)},
		})
		return done, err
	})
	return out, at, err
}

// RemoveVolume removes the key of a volume in state Deleting, after all its
// groups have made it a tombstone. It is no error if the key is gone.
func RemoveVolume(ctx context.Context, s Store, g Guard, id block.VolumeID) error {
	return attempt(ctx, "remove the volume", func() (bool, error) {
		v, kv, err := readVolume(ctx, s, id)
		if err != nil {
			if block.KindOf(err) == block.NotFound {
				return true, nil
			}
			return false, err
		}
		if v.State != Deleting {
			return false, block.Errorf(block.Internal, "volume %s is to be removed in state %s", id, v.State)
		}
		done, _, err := guarded(ctx, s, "remove the volume", g, Txn{
			If: append(g.Conds(), Unchanged(kv)), Then: []Op{Delete(kv.Key), Delete(ReservationsKey(id))}, Else: []Op{Read(ElectionKey)},
		})
		return done, err
	})
}
