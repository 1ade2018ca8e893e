package meta

import (
	"context"
	"slices"

	"firn.io/firn/internal/block"
)

// maxAttempts bounds the retries of a compare-and-set that others contend for.
const maxAttempts = 64

// attempt repeats try until it says that it is done, for a bounded time: try
// reads, decides, and runs a transaction that compares what it read; done is
// false when the transaction's conditions did not hold.
func attempt(ctx context.Context, what string, try func() (done bool, err error)) error {
	for range maxAttempts {
		done, err := try()
		if err != nil {
			return err
		}
		if done {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return block.Wrap(block.Canceled, err, "%s", what)
		}
	}
	return block.Errorf(block.Unavailable, "%s: others change the same keys all the time", what)
}

// leased runs a transaction whose Puts hang on a lease. The store reports a
// lease that has ended as NotFound; to callers of the catalog it is a passing
// state, since their sessions get another one.
func leased(ctx context.Context, s Store, t Txn) (TxnResult, error) {
	r, err := s.Txn(ctx, t)
	if err != nil && block.KindOf(err) == block.NotFound {
		err = block.Wrap(block.Unavailable, err, "the lease of this process has ended")
	}
	return r, err
}

// InitCluster writes the cluster's id if there is none yet, and returns the one
// that stands: that of whoever came first.
func InitCluster(ctx context.Context, s Store, id block.ClusterID) (ClusterMeta, error) {
	t := Txn{
		If:   []Cond{Absent(ClusterKey)},
		Then: []Op{Put(ClusterKey, encode(ClusterMeta{V: Format, ID: id}), 0), Read(ClusterKey)},
		Else: []Op{Read(ClusterKey)},
	}
	r, err := s.Txn(ctx, t)
	if err != nil {
		return ClusterMeta{}, err
	}
	return DecodeCluster(r.Read[0])
}

// GetCluster returns the cluster's value; NotFound before InitCluster.
func GetCluster(ctx context.Context, s Store) (ClusterMeta, error) {
	kv, err := s.Get(ctx, ClusterKey)
	if err != nil {
		return ClusterMeta{}, err
	}
	if !kv.Exists() {
		return ClusterMeta{}, block.Errorf(block.NotFound, "the metadata store holds no cluster yet; start a node first")
	}
	return DecodeCluster(kv)
}

// list reads all values below a prefix, in order of keys.
func list[T any](ctx context.Context, s Store, prefix string, decode func(KV) (T, error)) ([]T, error) {
	kvs, _, err := s.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := make([]T, 0, len(kvs))
	for _, kv := range kvs {
		v, err := decode(kv)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// ListNodes returns all nodes that ever registered, by id.
func ListNodes(ctx context.Context, s Store) ([]NodeMeta, error) {
	nodes, err := list(ctx, s, NodesPrefix, DecodeNode)
	slices.SortFunc(nodes, func(a, b NodeMeta) int { return int(a.ID) - int(b.ID) })
	return nodes, err
}

// ListLive returns what the nodes that live now say of themselves.
func ListLive(ctx context.Context, s Store) (map[block.NodeID]LiveMeta, error) {
	kvs, _, err := s.List(ctx, LivePrefix)
	if err != nil {
		return nil, err
	}
	live := map[block.NodeID]LiveMeta{}
	for _, kv := range kvs {
		id, err := ParseNodeKey(kv.Key)
		if err != nil {
			return nil, err
		}
		if live[id], err = DecodeLive(kv); err != nil {
			return nil, err
		}
	}
	return live, nil
}

// ListGroups returns all groups, by id.
func ListGroups(ctx context.Context, s Store) ([]GroupMeta, error) {
	groups, err := list(ctx, s, GroupsPrefix, DecodeGroup)
	slices.SortFunc(groups, func(a, b GroupMeta) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return groups, err
}

// ListVolumes returns all volumes, in any state, by name.
func ListVolumes(ctx context.Context, s Store) ([]VolumeMeta, error) {
	volumes, err := list(ctx, s, VolumesPrefix, DecodeVolume)
	slices.SortFunc(volumes, func(a, b VolumeMeta) int {
		if a.Name != b.Name {
			if a.Name < b.Name {
				return -1
			}
			return 1
		}
		return slices.Compare(a.ID[:], b.ID[:])
	})
	return volumes, err
}

// ListOwners returns the owners of the volumes that are attached now.
func ListOwners(ctx context.Context, s Store) (map[block.VolumeID]OwnerMeta, error) {
	kvs, _, err := s.List(ctx, OwnersPrefix)
	if err != nil {
		return nil, err
	}
	owners := map[block.VolumeID]OwnerMeta{}
	for _, kv := range kvs {
		id, err := ParseVolumeKey(kv.Key)
		if err != nil {
			return nil, err
		}
		if owners[id], err = DecodeOwner(kv); err != nil {
			return nil, err
		}
	}
	return owners, nil
}

// ListGateways returns the gateways that live now, by id.
func ListGateways(ctx context.Context, s Store) ([]GatewayMeta, error) {
	return list(ctx, s, GatewaysPrefix, DecodeGateway)
}

// GetGroup returns a group; NotFound if there is none of that id.
func GetGroup(ctx context.Context, s Store, id block.GroupID) (GroupMeta, error) {
	kv, err := s.Get(ctx, GroupKey(id))
	if err != nil {
		return GroupMeta{}, err
	}
	if !kv.Exists() {
		return GroupMeta{}, block.Errorf(block.NotFound, "there is no group %d", id)
	}
	return DecodeGroup(kv)
}

// GetNode returns a node; NotFound if none of that id ever registered.
func GetNode(ctx context.Context, s Store, id block.NodeID) (NodeMeta, error) {
	kv, err := s.Get(ctx, NodeKey(id))
	if err != nil {
		return NodeMeta{}, err
	}
	if !kv.Exists() {
		return NodeMeta{}, block.Errorf(block.NotFound, "node %d never registered", id)
	}
	return DecodeNode(kv)
}

// GetVolume returns a volume by its id, in any state; NotFound if there is none.
func GetVolume(ctx context.Context, s Store, id block.VolumeID) (VolumeMeta, error) {
	v, _, err := readVolume(ctx, s, id)
	return v, err
}

func readVolume(ctx context.Context, s Store, id block.VolumeID) (VolumeMeta, KV, error) {
	kv, err := s.Get(ctx, VolumeKey(id))
	if err != nil {
		return VolumeMeta{}, kv, err
	}
	if !kv.Exists() {
		return VolumeMeta{}, kv, block.Errorf(block.NotFound, "there is no volume %s", id)
	}
	v, err := DecodeVolume(kv)
	return v, kv, err
}

// FindVolume returns the volume of that name, not those being deleted; NotFound
// if there is none.
func FindVolume(ctx context.Context, s Store, name string) (VolumeMeta, error) {
	v, _, err := findVolume(ctx, s, name)
	return v, err
}

func findVolume(ctx context.Context, s Store, name string) (VolumeMeta, KV, error) {
	none := block.Errorf(block.NotFound, "there is no volume %.80q", name)
	if len(name) > MaxVolumeName || name == "" {
		return VolumeMeta{}, KV{}, none
	}
	kv, err := s.Get(ctx, NameKey(name))
	if err != nil {
		return VolumeMeta{}, KV{}, err
	}
	if !kv.Exists() {
		return VolumeMeta{}, KV{}, none
	}
	id, err := block.ParseUUID(string(kv.Value))
	if err != nil {
		return VolumeMeta{}, KV{}, block.Wrap(block.Corrupt, err, "key %q does not decode", kv.Key)
	}
	v, vkv, err := readVolume(ctx, s, id)
	// A rename or a deletion may have come between the two reads.
	if err == nil && (v.Name != name || v.State == Deleting) || err != nil && block.KindOf(err) == block.NotFound {
		return VolumeMeta{}, KV{}, none
	}
	return v, vkv, err
}
