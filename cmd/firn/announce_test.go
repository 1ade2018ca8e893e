package main

import (
	"bytes"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"firn.io/firn/internal/block"
)

// TestAnnouncedCommands: what is printed is what works.
func TestAnnouncedCommands(t *testing.T) {
	listen := func(network, addr string) net.Listener {
		t.Helper()
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	port := func(l net.Listener) string {
		_, port, _ := net.SplitHostPort(l.Addr().String())
		return port
	}
	loopback, all, socket := listen("tcp", "127.0.0.1:0"), listen("tcp", "0.0.0.0:0"), listen("unix", filepath.Join(t.TempDir(), "s"))
	api, allAPI, iscsi := listen("tcp", "127.0.0.1:0"), listen("tcp", "0.0.0.0:0"), listen("tcp", "0.0.0.0:0")
	for name, c := range map[string]struct {
		f    fronts
		want []string
		not  []string
	}{
		"loopback": {fronts{nbd: loopback, api: api}, []string{
			"NBD   127.0.0.1:" + port(loopback) + "\n",
			"firn status --api 127.0.0.1:" + port(api) + "\n",
			"  nbdinfo nbd://127.0.0.1:" + port(loopback) + "/v\n",
			"  nbdcopy disk.img nbd://127.0.0.1:" + port(loopback) + "/v\n",
			"  qemu-img convert -n -O raw disk.qcow2 nbd://127.0.0.1:" + port(loopback) + "/v\n",
			"  sudo nbd-client 127.0.0.1 " + port(loopback) + " /dev/nbd0 -N v\n",
		}, []string{"nbds", "[::]"}},
		"every address": {fronts{nbd: all, api: allAPI, http: all, iscsi: iscsiFront{l: iscsi}}, []string{
			"NBD   127.0.0.1:" + port(all) + "   (and the machine's other addresses)\n",
			"iSCSI 127.0.0.1:" + port(iscsi) + "   iscsi-ls -s iscsi://127.0.0.1:" + port(iscsi) + "\n",
			"API   127.0.0.1:" + port(allAPI) + "   firn status --api 127.0.0.1:" + port(allAPI) + "\n",
			"HTTP  http://127.0.0.1:" + port(all) + "\n",
			"  nbdinfo nbd://127.0.0.1:" + port(all) + "/v\n",
			"  sudo iscsiadm -m discovery -t st -p 127.0.0.1:" + port(iscsi) + " && sudo iscsiadm -m node -T iqn.2026-11.io.firn:v -l\n",
		}, []string{"[::]", "0.0.0.0"}},
		"advertised": {fronts{nbd: all, api: api, flags: frontFlags{advertiseNBD: "gw1:10809"}}, []string{
			"NBD   gw1:10809\n", "  nbdinfo nbd://gw1:10809/v\n", "  sudo nbd-client gw1 10809 /dev/nbd0 -N v\n",
		}, []string{"127.0.0.1:" + port(all)}},
		"TLS": {fronts{nbd: loopback, api: api, access: nbdAccess{require: true}, flags: frontFlags{nbdTLS: nbdTLSFlags{ca: "x"}, advertiseNBD: "gw1:10809",
			tls: tlsFlags{cert: "c.pem", key: "k.pem", ca: "a.pem"}}}, []string{
			"NBD   gw1:10809   (TLS; DIR below has ca-cert.pem, client-cert.pem, client-key.pem)\n",
			"  nbdinfo 'nbds://gw1:10809/v?tls-certificates=DIR'\n",
			"  qemu-img convert -n --object tls-creds-x509,id=t,endpoint=client,dir=DIR --target-image-opts disk.qcow2 driver=nbd,host=gw1,port=10809,export=v,tls-creds=t\n",
			" --tls-cert c.pem --tls-key k.pem --tls-ca a.pem\n",
		}, []string{" nbd://", "nbd-client"}},
		"unix": {fronts{nbd: socket, api: api}, []string{
			"NBD   unix:" + socket.Addr().String() + "\n", "  nbdinfo 'nbd+unix:///v?socket=", "  sudo nbd-client -unix " + socket.Addr().String() + " /dev/nbd0 -N v\n",
		}, nil},
		"unix, TLS": {fronts{nbd: socket, api: api, access: nbdAccess{require: true}}, []string{"  nbdinfo 'nbds+unix:///v?socket=", "&tls-certificates=DIR'"}, []string{"qemu-img"}},
	} {
		var out bytes.Buffer
		v := c.f.view(block.ClusterID{})
		v.Volumes = []volumeView{{Name: "v", SizeBytes: 1 << 30, Replicas: 1}}
		c.f.write(&out, v)
		for _, want := range c.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: no %q in\n%s", name, want, &out)
			}
		}
		for _, not := range c.not {
			if strings.Contains(out.String(), not) {
				t.Errorf("%s: %q in\n%s", name, not, &out)
			}
		}
	}
	if got := spelled(socket.Addr()); !strings.HasPrefix(got, "unix:/") {
		t.Errorf("a unix socket is spelled %q", got)
	}
}

// TestStatusSpellsAUnixSocket: what `firn status` shows can be given to --gateway.
func TestStatusSpellsAUnixSocket(t *testing.T) {
	var parts stack
	path := filepath.Join(t.TempDir(), "s")
	f := frontFlags{nbd: "unix:" + path, api: "127.0.0.1:0"}
	opened, err := f.listen(t.Context(), &parts)
	if err != nil {
		t.Fatal(err)
	}
	if opened.nbdAddr != "unix:"+path {
		t.Errorf("%q", opened.nbdAddr)
	}
	if err := parts.close(); err != nil {
		t.Error(err)
	}
}
