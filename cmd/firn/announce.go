package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"

	"firn.io/firn/internal/block"
	"firn.io/firn/iscsi"
)

// readyView is what a role prints with --json once it is ready. NBD, ISCSI, API and
// HTTP are where clients reach them: as advertised or, of a listener on every
// address, at the loopback one.
type readyView struct {
	Ready   bool         `json:"ready"`
	Cluster string       `json:"cluster_id"`
	NBD     string       `json:"nbd,omitempty"`
	ISCSI   string       `json:"iscsi,omitempty"`
	API     string       `json:"api,omitempty"`
	HTTP    string       `json:"http,omitempty"`
	Listen  string       `json:"listen,omitempty"`
	Volumes []volumeView `json:"volumes,omitempty"`
}

func (f *fronts) view(cluster block.ClusterID) readyView {
	v := readyView{Ready: true, Cluster: cluster.String(), API: reached(f.api.Addr()), NBD: cmp.Or(f.flags.advertiseNBD, reached(f.nbd.Addr()))}
	if f.iscsi.l != nil {
		v.ISCSI = cmp.Or(f.iscsi.portal, reached(f.iscsi.l.Addr()))
	}
	if f.http != nil {
		v.HTTP = reached(f.http.Addr())
	}
	return v
}

// spelled is a listener's address as flags spell it.
func spelled(a net.Addr) string {
	if a.Network() == "unix" {
		return "unix:" + a.String()
	}
	return a.String()
}

// everywhere tells whether a listener takes what comes to any address of the machine.
func everywhere(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsUnspecified()
}

// reached is where a client on this machine reaches a listener.
func reached(a net.Addr) string {
	if !everywhere(a) {
		return spelled(a)
	}
	_, port, _ := net.SplitHostPort(a.String())
	return net.JoinHostPort("127.0.0.1", port)
}

// maxAnnounced bounds the volumes whose commands are shown.
const maxAnnounced = 4

// write tells people what is served and how to use it.
func (f *fronts) write(w io.Writer, v readyView) {
	fmt.Fprintf(w, "NBD   %s%s\n", v.NBD, f.notes())
	if v.ISCSI != "" {
		fmt.Fprintf(w, "iSCSI %s   iscsi-ls -s iscsi://%s\n", v.ISCSI, v.ISCSI)
	}
	fmt.Fprintf(w, "API   %s   firn status%s\n", v.API, f.apiFlags(v.API))
	if v.HTTP != "" {
		fmt.Fprintf(w, "HTTP  http://%s\n", v.HTTP)
	}
	for i, volume := range v.Volumes {
		if i == maxAnnounced {
			fmt.Fprintf(w, "\nand %d more: firn volume ls\n", len(v.Volumes)-i)
			break
		}
		fmt.Fprintf(w, "\n%s, %s, %d %s:\n", volume.Name, formatSize(volume.SizeBytes), volume.Replicas, plural(int(volume.Replicas), "replica"))
		for _, command := range f.commands(v, volume.Name) {
			fmt.Fprintf(w, "  %s\n", command)
		}
	}
}

// notes say what a client has to know of the NBD address.
func (f *fronts) notes() string {
	var notes []string
	if f.flags.advertiseNBD == "" && everywhere(f.nbd.Addr()) {
		notes = append(notes, "and the machine's other addresses")
	}
	if f.access.require {
		notes = append(notes, "TLS; DIR below has ca-cert.pem")
	}
	if f.access.require && f.flags.nbdTLS.ca != "" {
		notes = append(notes, "client-cert.pem, client-key.pem")
	}
	if len(notes) == 0 {
		return ""
	}
	return "   (" + strings.Join(notes, ", ") + ")"
}

// apiFlags are what a command needs to reach the API at addr.
func (f *fronts) apiFlags(addr string) string {
	out, t := "", &f.flags.tls
	if addr != defaultAPI {
		out += " --api " + addr
	}
	if t.cert != "" {
		out += fmt.Sprintf(" --tls-cert %s --tls-key %s --tls-ca %s", t.cert, t.key, t.ca)
	} else if !isLoopback(addr) {
		out += " --insecure"
	}
	return out
}

// commands are ready-made ones for a volume: they work as they stand, but for the
// names of images, and for DIR where TLS is required.
func (f *fronts) commands(v readyView, volume string) []string {
	uri := f.uri(v.NBD, volume)
	quoted := uri
	if strings.ContainsAny(uri, "?&") {
		quoted = "'" + uri + "'"
	}
	out := []string{"nbdinfo " + quoted, "nbdcopy disk.img " + quoted}
	host, port, err := net.SplitHostPort(v.NBD)
	path, unix := strings.CutPrefix(v.NBD, "unix:")
	switch {
	case f.access.require && unix:
		// QEMU has no TLS over unix sockets without a host's name.
	case f.access.require:
		out = append(out, fmt.Sprintf("qemu-img convert -n --object tls-creds-x509,id=t,endpoint=client,dir=DIR --target-image-opts disk.qcow2 driver=nbd,host=%s,port=%s,export=%s,tls-creds=t",
			host, port, volume))
	default:
		out = append(out, "qemu-img convert -n -O raw disk.qcow2 "+quoted)
		if unix {
			out = append(out, fmt.Sprintf("sudo nbd-client -unix %s /dev/nbd0 -N %s", path, volume))
		} else if err == nil {
			out = append(out, fmt.Sprintf("sudo nbd-client %s %s /dev/nbd0 -N %s", host, port, volume))
		}
	}
	if v.ISCSI != "" {
		out = append(out, fmt.Sprintf("sudo iscsiadm -m discovery -t st -p %s && sudo iscsiadm -m node -T %s%s -l", v.ISCSI, iscsi.NamePrefix, volume))
	}
	return out
}

// uri is what libnbd calls the export at an address.
func (f *fronts) uri(addr, volume string) string {
	scheme, query := "nbd", url.Values{}
	if f.access.require {
		scheme = "nbds"
		query.Set("tls-certificates", "DIR")
	}
	if path, unix := strings.CutPrefix(addr, "unix:"); unix {
		scheme, addr = scheme+"+unix", ""
		query.Set("socket", path)
	}
	u := scheme + "://" + addr + "/" + url.PathEscape(volume)
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	return u
}
