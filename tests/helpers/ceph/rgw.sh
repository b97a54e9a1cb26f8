#!/usr/bin/env bash
# A throw-away Ceph on the loopback: a monitor, one OSD that keeps its objects in memory, and a RADOS Gateway that speaks S3.
# usage: rgw.sh S3_PORT MON_PORT
# Prints the endpoint's URL once it answers, then serves until its standard input is closed; leaves no process and no file.
# AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY become the credentials of its one user.
# Needs the Debian packages radosgw, ceph-mon, ceph-osd and ceph-common; no root. What Ceph says is in DIR/log until it ends.
set -euo pipefail
s3_port=$1 mon_port=$2
dir=$(mktemp -d "${TMPDIR:-/tmp}/rgw.XXXXXX")
export CEPH_CONF=$dir/ceph.conf
daemons=()

finish() {
  local code=$?
  [ "$code" = 0 ] || tail -n 20 "$dir"/log/* >&2 || true
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do # all of it is thrown away: nothing needs time to say good-bye
    kill -KILL "${daemons[i]}" 2>/dev/null || true
    wait "${daemons[i]}" 2>/dev/null || true
  done
  rm -rf "$dir"
  exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

mkdir "$dir"/{mon,osd,rgw,run,log}
# cephx stays on: without it radosgw hangs at its start. The paxos settings spare seconds while pools are made, tcp_nodelay
# 40 ms a request. Sockets for administration are off: a long DIR would exceed the length that their paths may have.
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon_host = [v2:127.0.0.1:$mon_port/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
auth_allow_insecure_global_id_reclaim = true
keyring = $dir/keyring
run_dir = $dir/run
log_file = $dir/log/\$name.log
crash_dir = $dir
admin_socket =
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_osd_initial_require_min_compat_client = octopus
paxos_propose_interval = 0.01
paxos_min_wait = 0.01
[mon.a]
mon_data = $dir/mon
[osd]
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 1073741824
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:$s3_port tcp_nodelay=1
rgw_data = $dir/rgw
rgw_dns_name = localhost
rgw_thread_pool_size = 32
rgw_gc_max_objs = 8
rgw_dynamic_resharding = false
rgw_override_bucket_index_max_shards = 1
CONF

# daemon NAME PROGRAM...: in the foreground of a job of ours, and killed by the kernel should this script be.
daemon() {
  local name=$1
  shift
  setpriv --pdeathsig KILL "$@" </dev/null >"$dir/log/$name.out" 2>&1 &
  daemons+=($!)
}
wait_for() {
  for _ in {1..600}; do
    "$@" && return
    kill -0 "${daemons[-1]}" || return 1
    sleep 0.05
  done
  return 1
}
quietly() { timeout 30 "$@" >"$dir/log/commands.out" 2>&1; }
osd_is_up() { timeout 30 ceph osd stat 2>/dev/null | grep -q ' 1 up'; }
http_answers() {
  local status=
  { exec 3<>"/dev/tcp/127.0.0.1/$s3_port"; } 2>/dev/null || return 1
  printf 'GET / HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
  read -r -t 5 status <&3 || true
  exec 3>&-
  [[ $status == HTTP/1.* ]]
}

# All keys exist before the monitor does, so none has to be added to it.
add_key() { quietly ceph-authtool "$dir/keyring" --gen-key -n "$@"; }
quietly ceph-authtool --create-keyring "$dir/keyring"
add_key mon. --cap mon 'allow *'
add_key client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
add_key osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *'
add_key client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx'

fsid=$(sed -n 's/^fsid = //p' "$CEPH_CONF")
quietly monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon_port]" "$dir/monmap"
quietly ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
daemon mon ceph-mon -f -i a

osd_uuid=$(cat /proc/sys/kernel/random/uuid)
quietly ceph osd new "$osd_uuid"
quietly ceph-osd -i 0 --mkfs --osd-uuid "$osd_uuid"
quietly ceph osd crush add osd.0 1.0 root=default host=localhost
daemon osd ceph-osd -f -i 0
wait_for osd_is_up
daemon rgw radosgw -f -n client.rgw.a
wait_for http_answers
quietly radosgw-admin user create --uid=test --display-name=test \
  --access-key="$AWS_ACCESS_KEY_ID" --secret-key="$AWS_SECRET_ACCESS_KEY"

echo "http://127.0.0.1:$s3_port"
cat >/dev/null # until whoever started this closes its end, or is gone
